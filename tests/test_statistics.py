"""Statistics against scipy, against brute force, and against their own promises under the null."""

import itertools

import numpy as np
import pytest
from scipy import stats

from trl_sae_audit import statistics
from trl_sae_audit.statistics import (
    benjamini_hochberg,
    effect_unit,
    mann_kendall,
    standard_error_of_sum,
    two_sided_normal_p,
    two_sided_t_p,
)


def test_standard_error_is_sqrt_n_times_the_sample_deviation(rng):
    contributions = rng.standard_normal((7, 5))
    found = standard_error_of_sum(contributions.sum(0), (contributions**2).sum(0), 7)
    np.testing.assert_allclose(found, np.sqrt(7) * contributions.std(0, ddof=1))


def test_standard_error_is_unknown_below_two_examples():
    total = np.ones((3, 2))
    found = standard_error_of_sum(total, total, np.array([[0], [1], [2]]))
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2]).all()


def test_standard_error_of_equal_contributions_is_zero_not_nan():
    assert standard_error_of_sum(np.array([0.3 * 7]), np.array([0.09 * 7]), 7)[0] == pytest.approx(
        0, abs=1e-7
    )


def test_normal_p_is_accurate_far_in_the_tail():
    np.testing.assert_allclose(
        two_sided_normal_p(np.array([0.0, -1.96, 20.0])), 2 * stats.norm.sf([0, 1.96, 20])
    )


def test_benjamini_hochberg_ignores_what_is_not_known():
    p = np.array([0.01, np.nan, 0.02, 0.5])
    q = benjamini_hochberg(p)
    np.testing.assert_allclose(q[[0, 2, 3]], stats.false_discovery_control([0.01, 0.02, 0.5]))
    assert np.isnan(q[1])
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()


@pytest.mark.parametrize("n_times", [3, 10, 31])
@pytest.mark.parametrize("tied", [False, True])
def test_mann_kendall_matches_scipy(rng, n_times, tied):
    series = rng.standard_normal((n_times, 40)).astype(np.float32)
    series[:, :10] += np.linspace(0, 3, n_times)[:, None]
    if tied:
        series = np.round(series)
        series[0], series[1] = -9, 9
    tau, p = mann_kendall(series)
    for feature in range(series.shape[1]):
        reference = stats.kendalltau(np.arange(n_times), series[:, feature], method="asymptotic")
        assert tau[feature] == pytest.approx(reference.statistic, abs=1e-12)
        score = sum(
            np.sign(later - earlier) for earlier, later in itertools.combinations(series[:, feature], 2)
        )
        if score:
            deviation = abs(score) / stats.norm.isf(reference.pvalue / 2)
            corrected = 2 * stats.norm.sf((abs(score) - 1) / deviation)
            assert p[feature] == pytest.approx(corrected, rel=1e-6)


def test_mann_kendall_p_is_close_to_the_exact_one(rng):
    series = rng.standard_normal((12, 60))
    _, p = mann_kendall(series)
    exact = [stats.kendalltau(np.arange(12), column, method="exact").pvalue for column in series.T]
    np.testing.assert_allclose(p, exact, atol=0.01)


def test_mann_kendall_of_nothing_to_rank_is_nan():
    series = np.ones((5, 3))
    series[:, 1] = [1, 2, np.nan, 4, 5]
    series[:, 2] = np.arange(5)
    tau, p = mann_kendall(series)
    assert np.isnan(tau[:2]).all()
    assert np.isnan(p[:2]).all()
    assert tau[2] == 1
    for n_times in (0, 1):
        assert np.isnan(mann_kendall(np.zeros((n_times, 4)))[1]).all()


def test_chunks_change_no_trend(rng, monkeypatch):
    series = np.round(rng.standard_normal((9, 50)), 1)
    before = mann_kendall(series)
    monkeypatch.setattr(statistics, "_CELLS", 100)
    after = mann_kendall(series)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_two_sided_t_p_matches_scipy() -> None:
    t, degrees = np.array([0.0, -2.5, 7.0, np.nan]), np.array([3.0, 1.4, 50.0, 5.0])
    np.testing.assert_allclose(two_sided_t_p(t, degrees), 2 * stats.t.sf(np.abs(t), degrees), rtol=1e-10)
    normal = two_sided_normal_p(np.array([1.0, 4.0]))
    np.testing.assert_allclose(two_sided_t_p(np.array([1.0, 4.0]), np.full(2, np.inf)), normal, rtol=1e-10)


def test_an_effect_is_in_units_of_its_own_deviation_and_twice_the_median() -> None:
    unit = effect_unit(np.array([3.0, 0.0, np.nan, 1.0, 2.0]))
    np.testing.assert_allclose(unit, [5.0, np.nan, np.nan, np.sqrt(17), np.sqrt(20)])
    assert np.isnan(effect_unit(np.zeros(3))).all()
