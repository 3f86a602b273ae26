"""Running totals against the same sums made at once, from all steps, by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trl_sae_audit.attribution import score_totals
from trl_sae_audit.attribution.curriculum import CurriculumMap
from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.errors import AuditError
from trl_sae_audit.statistics import two_sided_normal_p

F = 6


def make_rows(n_steps, seed=0):
    rng = np.random.default_rng(seed)
    positive, negative = rng.standard_normal((2, n_steps, F)).astype(np.float32)
    return {
        "attribution": positive + negative,
        "positive": positive,
        "negative": negative,
        "variance": rng.uniform(0.1, 2, (n_steps, F)).astype(np.float32),
        "share": rng.uniform(0, 0.1, (n_steps, F)).astype(np.float32),
        "extras": {"token_share": rng.uniform(0, 1, (n_steps, F)), "activation_attribution": positive * 2},
        "finite": rng.uniform(size=n_steps) > 0.1,
    }


def cut(rows, steps):
    extras = {name: values[steps] for name, values in rows["extras"].items()}
    return {name: values[steps] for name, values in rows.items() if name != "extras"} | {"extras": extras}


def accumulate(rows, groups, max_bins=8):
    totals, start = FeatureTotals(F, max_bins), 0
    for size in groups:
        totals.update(**cut(rows, slice(start, start + size)))
        start += size
    return totals


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].tobytes() == other[name].tobytes(), name


def test_frame_is_what_all_steps_at_once_give():
    rows = make_rows(100)
    frame = accumulate(rows, [100]).frame(d_model=640)
    kept = rows["finite"]
    t = np.arange(1, 101)[kept]
    x = rows["attribution"].astype(np.float64)[kept]
    assert 50 < kept.sum() < 100
    np.testing.assert_array_equal(frame["feature"], np.arange(F))
    np.testing.assert_allclose(frame["attribution"], x.sum(0))
    np.testing.assert_allclose(frame["attribution_mean"], x.mean(0))
    error = np.sqrt(rows["variance"][kept].sum(0, dtype=np.float64))
    np.testing.assert_allclose(frame["standard_error"], error)
    np.testing.assert_allclose(frame["z"], x.sum(0) / error)
    np.testing.assert_allclose(frame["p_value"], 2 * stats.norm.sf(np.abs(x.sum(0) / error)))
    np.testing.assert_allclose(frame["q_value"], stats.false_discovery_control(frame["p_value"]))
    np.testing.assert_allclose(frame["share"], rows["share"][kept].mean(0, dtype=np.float64))
    np.testing.assert_allclose(frame["lift"], frame["share"] * 640)
    np.testing.assert_array_equal(frame["positive_steps"], (x > 0).sum(0))
    np.testing.assert_array_equal(frame["negative_steps"], (x < 0).sum(0))
    np.testing.assert_allclose(frame["positive"], rows["positive"][kept].sum(0, dtype=np.float64))
    np.testing.assert_allclose(frame["negative"], rows["negative"][kept].sum(0, dtype=np.float64))
    np.testing.assert_allclose(frame["attribution"], frame["positive"] + frame["negative"], atol=1e-4)
    np.testing.assert_allclose(frame["trend"], [stats.linregress(t, column).slope for column in x.T])
    np.testing.assert_allclose(frame["token_share"], rows["extras"]["token_share"][kept].mean(0))
    extra = rows["extras"]["activation_attribution"][kept].sum(0, dtype=np.float64)
    np.testing.assert_allclose(frame["activation_attribution"], extra)


def test_squares_are_kept_too():
    rows = make_rows(30)
    totals = accumulate(rows, [30])
    expected = (rows["attribution"].astype(np.float64)[rows["finite"]] ** 2).sum(0)
    np.testing.assert_allclose(totals.attribution.sums["score_squared"], expected)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=20), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_grouping_and_resuming_change_no_bit(groups, seed):
    rows = make_rows(sum(groups), seed)
    whole = accumulate(rows, [sum(groups)]).state_dict()
    assert_same_bits(whole, accumulate(rows, groups).state_dict())
    resumed = FeatureTotals.from_state(accumulate(rows, groups[: len(groups) // 2]).state_dict())
    done = sum(groups[: len(groups) // 2])
    resumed.update(**cut(rows, slice(done, None)))
    assert_same_bits(whole, resumed.state_dict())


def test_features_are_summed_alike_in_any_block(monkeypatch):
    rows = make_rows(20)
    whole = accumulate(rows, [20]).state_dict()
    monkeypatch.setattr(score_totals, "_BLOCK", 4)
    assert_same_bits(whole, accumulate(rows, [20]).state_dict())


def test_from_state_shares_no_memory():
    rows = make_rows(4)
    totals = accumulate(rows, [4])
    copy = FeatureTotals.from_state(totals.state_dict())
    before = copy.frame(8)
    totals.update(**rows)
    assert before.equals(copy.frame(8))


def test_nonfinite_steps_are_counted_and_left_out():
    rows = make_rows(5)
    rows["finite"] = np.array([True, False, True, True, True])
    rows["attribution"][1] = np.nan
    rows["attribution"][3, 2] = np.inf
    totals = accumulate(rows, [5])
    assert (totals.steps, totals.attribution.nonfinite_steps, totals.attribution.finite_steps) == (5, 2, 3)
    assert np.isfinite(totals.frame(8)[["attribution", "trend", "share", "trend_tau"]].to_numpy()).all()
    means = totals.attribution.curriculum.frame()
    assert np.isnan(means.to_numpy()).all(axis=1).tolist() == [False, True, False, True, False]


def test_unknown_standard_errors_are_taken_to_be_like_the_others():
    rows = make_rows(6)
    rows["finite"][:] = True
    rows["variance"][:] = 2.0
    rows["variance"][4:] = np.nan
    totals = accumulate(rows, [6])
    assert totals.attribution.variance_steps == 4
    np.testing.assert_allclose(totals.frame(8)["standard_error"], np.sqrt(12))


def test_no_known_standard_error_gives_no_p_value():
    rows = make_rows(6)
    rows["variance"][:] = np.nan
    frame = accumulate(rows, [6]).frame(8)
    assert frame[["standard_error", "z", "p_value", "q_value"]].isna().all(axis=None)


def test_nothing_seen_gives_a_frame_of_unknowns():
    frame = FeatureTotals(F).frame(8)
    assert len(frame) == F
    assert (frame["attribution"] == 0).all()
    assert frame[["attribution_mean", "share", "trend", "trend_tau", "q_value"]].isna().all(axis=None)


def test_trend_test_sees_a_drift_and_not_noise():
    rng = np.random.default_rng(0)
    attribution = rng.standard_normal((400, F)).astype(np.float32)
    attribution[:, 0] += np.linspace(-1, 1, 400)
    zeros = np.zeros_like(attribution)
    totals = FeatureTotals(F, 32)
    totals.update(attribution, attribution, zeros, zeros + 1, zeros)
    frame = totals.frame(8)
    assert frame["trend_q_value"][0] < 0.01
    assert frame["trend_tau"][0] > 0.3
    assert frame["trend"][0] == pytest.approx(2 / 399, rel=0.3)
    assert (frame["trend_p_value"][1:] > 0.01).all()


@pytest.mark.parametrize(("n_steps", "width"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 4), (100, 16)])
def test_curriculum_bins_double_and_lose_nothing(n_steps, width):
    rows = np.arange(n_steps * 2, dtype=np.float32).reshape(n_steps, 2)
    curriculum = CurriculumMap(2, max_bins=8)
    for row in rows:
        curriculum.add(row)
    frame = curriculum.frame()
    assert curriculum.width == width
    assert len(frame) <= 8
    assert curriculum.counts.sum() == n_steps
    covered = [step for first, last in frame.index for step in range(first, last + 1)]
    assert covered == list(range(1, n_steps + 1))
    for (first, last), values in zip(frame.index, frame.to_numpy(), strict=True):
        np.testing.assert_allclose(values, rows[first - 1 : last].mean(0))


def test_size_does_not_grow_with_steps():
    rows = make_rows(300)
    early, late = accumulate(rows, [64], 64).state_dict(), accumulate(rows, [300], 64).state_dict()
    assert sum(a.nbytes for a in late.values()) <= sum(a.nbytes for a in early.values())


@pytest.mark.parametrize("max_bins", [0, 1, 7, 1 << 40])
def test_bins_that_cannot_merge_are_refused(max_bins):
    with pytest.raises(AuditError, match="even number"):
        FeatureTotals(F, max_bins)


def test_wrong_shapes_are_refused_and_change_nothing():
    rows = make_rows(3)
    totals = accumulate(rows, [3])
    before = {name: values.copy() for name, values in totals.state_dict().items()}
    with pytest.raises(AuditError, match="share has shape"):
        totals.update(**(rows | {"share": rows["share"][:, :2]}))
    with pytest.raises(AuditError, match="token_share has shape"):
        totals.update(**(rows | {"extras": rows["extras"] | {"token_share": np.zeros((2, F))}}))
    with pytest.raises(AuditError, match="same names"):
        totals.update(**(rows | {"extras": {}}))
    assert_same_bits(before, totals.state_dict())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("attribution.sums.share", lambda a: a[:-1]),
        ("attribution.sums.score", lambda a: a.astype(np.float32)),
        ("attribution.sums.score", lambda a: a[:, None]),
        ("attribution.curriculum.sums", lambda a: a[:-1]),
        ("attribution.curriculum.max_bins", lambda a: a[0]),
        ("attribution.curriculum.width", lambda a: a + 1),
        ("attribution.steps", lambda a: -a),
        ("attribution.counts.positive_steps", lambda a: None),
    ],
)
def test_damaged_state_is_refused(name, damage):
    state = accumulate(make_rows(7), [7]).state_dict()
    state[name] = damage(state[name])
    if state[name] is None:
        del state[name]
    with pytest.raises(AuditError, match=r"another|damaged"):
        FeatureTotals.from_state(state)


def test_state_with_something_unknown_is_refused():
    with pytest.raises(AuditError, match="'novelty'"):
        FeatureTotals.from_state(accumulate(make_rows(2), [2]).state_dict() | {"novelty": np.zeros(1)})


def test_p_values_hold_with_two_examples_a_step_of_unequal_size() -> None:
    """Two examples say little about their own spread: a normal p-value would find features in pure noise."""
    rng = np.random.default_rng(0)
    n_steps, n_features = 12, 4000
    size = rng.lognormal(sigma=1.0, size=(n_steps, 1, 1))
    contributions = rng.normal(size=(n_steps, 2, n_features)) * size
    attribution = contributions.sum(1).astype(np.float32)
    variance = (2 * contributions.var(1, ddof=1)).astype(np.float32)
    zero = np.zeros_like(attribution)
    totals = FeatureTotals(n_features)
    totals.update(attribution, zero, zero, variance, zero, degrees=np.ones(n_steps))
    frame = totals.frame(d_model=8)
    assert (frame["degrees_of_freedom"] <= n_steps).all()
    assert (frame["p_value"] < 0.05).mean() < 0.06
    assert (frame["p_value"] < 0.001).mean() < 0.003
    assert (two_sided_normal_p(frame["z"].to_numpy()) < 0.001).mean() > 0.01
    assert not (frame["q_value"] < 0.05).any()
