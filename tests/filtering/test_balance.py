"""The share of each row that stays, against what it must leave: nothing to tell the answers apart by."""

from __future__ import annotations

import numpy as np
import pytest

from trl_sae_audit.filtering.balance import kept_shares, spread_evenly


def scores_with_log_odds(seed: int = 0, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Sizes at random, and of each a sign whose odds are exp(size)."""
    generator = np.random.default_rng(seed)
    size = np.abs(generator.normal(1.0, 1.0, n))
    return size, np.where(generator.random(n) < 1 / (1 + np.exp(-size)), size, -size)


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
def test_what_stays_has_mean_zero_whatever_the_unit(unit):
    _, score = scores_with_log_odds()
    shares = kept_shares(score * unit)
    assert (shares * score).sum() == pytest.approx(0, abs=1e-6 * np.abs(score).sum())
    assert (shares[score <= 0] == 1).all()
    np.testing.assert_allclose(shares, kept_shares(score), rtol=1e-6)


def test_log_odds_are_kept_as_they_are_and_both_signs_are_equally_frequent_at_every_size():
    size, score = scores_with_log_odds(n=40_000)
    shares = kept_shares(score)
    np.testing.assert_allclose(shares, np.exp(-np.maximum(score, 0)), atol=0.02)
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0)):
        here = (size >= low) & (size < high)
        up, down = shares[here & (score > 0)].sum(), shares[here & (score < 0)].sum()
        assert up == pytest.approx(down, rel=0.06)
    excess = (score > 0).sum() - (score < 0).sum()
    assert (1 - shares).sum() == pytest.approx(excess, rel=0.03)


def test_a_score_that_is_not_log_odds_is_calibrated():
    _, score = scores_with_log_odds()
    bent = np.sign(score) * np.abs(score) ** 3
    assert (kept_shares(bent) * bent).sum() == pytest.approx(0, abs=1e-6 * np.abs(bent).sum())


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ([0.0, 0.0], [1, 1]),
        ([-1.0, 0.5], [1, 1]),
        ([1.0, -1.0], [1, 1]),
        ([1.0, 0.0, 2.0], [0, 1, 0]),
        ([], []),
    ],
)
def test_edges(score, expected):
    np.testing.assert_array_equal(kept_shares(np.array(score, float)), expected)


def test_whole_numbers_follow_what_is_expected_of_every_stretch():
    generator = np.random.default_rng(3)
    expected, order = generator.random(500) * 2.5, generator.permutation(500)
    found = spread_evenly(expected, order)
    assert found.dtype == np.int64
    off = np.cumsum(found[order]) - np.cumsum(expected[order])
    assert np.abs(off).max() <= 0.5 + 1e-9
    whole = generator.integers(0, 2, 500).astype(float)
    np.testing.assert_array_equal(spread_evenly(whole, order), whole)
