"""Statistics of an audit: against plain formulas on all contributions, and against their own promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from trl_sae_audit import FeatureDictionary
from trl_sae_audit.audit.gradients import PROMPT_TAIL, ExampleArrays
from trl_sae_audit.audit.prompt_states import state_size
from trl_sae_audit.audit.statistics import ResamplingConfig, feature_statistics
from trl_sae_audit.audit.store import Part
from trl_sae_audit.statistics import benjamini_hochberg

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version


def parts_of(gradient, length=None, cut=16):
    """Parts holding given gradients [n, R, d_model], with no activations."""
    gradient = np.asarray(gradient, np.float32)
    n, answers, _ = gradient.shape
    length = np.full((n, answers), 5) if length is None else np.asarray(length)
    side = np.tile(np.array([1, -1], np.int8)[:answers], (n, 1))
    nothing = np.zeros(0, np.float32)
    parts = []
    for start in range(0, n, cut):
        rows = slice(start, min(start + cut, n))
        k = rows.stop - start
        arrays = ExampleArrays(
            gradient=gradient[rows],
            side=side[rows],
            length=length[rows].astype(np.int32),
            log_prob=np.zeros((k, answers), np.float32),
            weight=np.zeros((k, answers), np.float32),
            residual=np.zeros_like(gradient[rows]),
            indptr=np.zeros(k * answers + 1, np.int64),
            feature=np.zeros(0, np.int32),
            mean=nothing,
            max_activation=nothing,
            activation_attribution=nothing,
            selected=nothing,
            peak=np.zeros(0, np.int32),
            active_tokens=np.zeros(0, np.int32),
            token_indptr=np.zeros(k * answers + 1, np.int64),
            token=np.zeros(0, np.int32),
            prompt_tail=np.full((k, answers, PROMPT_TAIL), -1, np.int32),
            prompt_state=np.zeros((k, state_size(gradient.shape[-1])), np.float32),
        )
        parts.append(Part(np.arange(start, rows.stop), np.zeros((k, 32), np.uint8), [], arrays, {}))
    return parts


def unit(rng, d_sae, d_model):
    rows = rng.standard_normal((d_sae, d_model)).astype(np.float32)
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def table_of(gradient, directions, settings=None, **options):
    parts = parts_of(gradient, **options)
    dictionary = FeatureDictionary(directions, "model.layers.0", "test")
    return feature_statistics(lambda: parts, dictionary, len(gradient), settings)


def test_every_column_against_its_formula_on_all_contributions(rng):
    gradient = rng.standard_normal((50, 2, 12)) + 0.1
    length = rng.integers(1, 40, size=(50, 2))
    directions = unit(rng, 30, 12)
    table = table_of(gradient, directions, length=length)
    c = -(gradient.sum(1) @ directions.numpy().T)
    np.testing.assert_allclose(table["attribution"], c.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        table["positive"], -(gradient[:, 0] @ directions.numpy().T).mean(0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(table["standard_error"], c.std(0, ddof=1) / np.sqrt(50), rtol=1e-4)
    np.testing.assert_allclose(table["effective_examples"], np.abs(c).sum(0) ** 2 / (c**2).sum(0), rtol=1e-4)
    difference = length[:, 0] - length[:, 1]
    for feature in range(30):
        fit = stats.linregress(difference, c[:, feature])
        assert table["length_correlation"][feature] == pytest.approx(fit.rvalue, rel=1e-3, abs=1e-5)
        assert table["attribution_at_equal_length"][feature] == pytest.approx(
            fit.intercept, rel=1e-3, abs=1e-5
        )
        expected = 2 * stats.t.sf(abs(fit.intercept / fit.intercept_stderr), 48)
        assert table["length_p_value"][feature] == pytest.approx(expected, rel=1e-2, abs=1e-6)
    g = gradient.sum((0, 1))
    np.testing.assert_allclose(
        table["share"], (directions.numpy() @ g / np.linalg.norm(g)) ** 2, rtol=1e-4, atol=1e-8
    )
    np.testing.assert_allclose(table["lift"], table["share"] * 12)


def sign_flip_p(contributions, flips=np.inf):
    """SciPy's, of every flip or of so many random ones."""
    if len(contributions) == 1:
        return np.ones(contributions.shape[1])
    return stats.permutation_test(
        (contributions,),
        lambda x, axis: x.sum(axis),
        permutation_type="samples",
        n_resamples=flips,
        batch=1000,
        rng=5,
    ).pvalue


@pytest.mark.parametrize("n", [1, 2, 7, 13])
def test_few_examples_are_flipped_in_every_way(rng, n):
    gradient, directions = rng.standard_normal((n, 1, 8)), unit(rng, 20, 8)
    p = table_of(gradient, directions)["p_value"]
    expected = sign_flip_p(-(gradient.sum(1) @ directions.numpy().T))
    np.testing.assert_allclose(p, expected)


def test_many_examples_are_flipped_at_random_and_tails_bounded(rng):
    gradient, directions = rng.standard_normal((80, 1, 8)) + 0.1, unit(rng, 50, 8)
    p = table_of(gradient, directions)["p_value"]
    c = -(gradient.sum(1) @ directions.numpy().T)
    many = sign_flip_p(c, 99_999)
    np.testing.assert_allclose(p, many, atol=0.02, rtol=0.3)
    strong = table_of(rng.standard_normal((80, 1, 8)) * 0.1 + 1, directions)
    assert strong["p_value"].min() < 1e-12


def test_the_tail_bound_holds_where_it_can_be_enumerated(rng):
    """3.178 times the normal tail is never below the exact sign-flip p."""
    from trl_sae_audit.audit.statistics import RADEMACHER
    from trl_sae_audit.statistics import two_sided_normal_p

    for c in (
        np.ones((12, 1)),
        np.array([[1.0], [1.0]]),
        rng.standard_normal((12, 200)),
        0.6 ** np.arange(12)[:, None],
    ):
        exact = sign_flip_p(c)
        z = np.abs(c.sum(0)) / np.sqrt((c**2).sum(0))
        assert (exact <= np.minimum(RADEMACHER * two_sided_normal_p(z - 1e-9), 1) + 1e-12).all()


def test_cutting_into_parts_changes_nothing(rng):
    gradient, directions = rng.standard_normal((45, 2, 8)), unit(rng, 20, 8)
    one, other = (table_of(gradient, directions, cut=cut) for cut in (7, 100))
    for column in one:
        np.testing.assert_allclose(one[column], other[column], rtol=1e-4, atol=1e-7, err_msg=column)


def test_p_values_are_uniform_when_labels_are_shuffled(rng):
    """2,000 independent features: Kolmogorov–Smirnov knows no dependence."""
    effects = rng.standard_t(4, size=(60, 1, 2000)) * rng.uniform(0.2, 3, size=(60, 1, 1)) + 0.5
    independent = effects * rng.choice([-1, 1], size=(60, 1, 2000))
    p = table_of(independent, torch.eye(2000), ResamplingConfig(n_flips=1999))["p_value"]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_benjamini_hochberg_flags_nothing_in_shuffled_labels(rng):
    directions = unit(rng, 2000, 32)
    quiet = 0
    for _ in range(100):
        gradient = rng.standard_t(4, size=(50, 1, 32)) + 0.5
        shuffled = gradient * rng.choice([-1, 1], size=(50, 1, 1))
        table = table_of(shuffled, directions, ResamplingConfig(n_flips=1999, n_halves=1))
        quiet += bool((table["q_value"] > 0.05).all())
    assert quiet >= 95


def test_power_rises_with_the_planted_effect(rng):
    """200 of 2,000 features with an effect of δ standard deviations, 100 examples; see docs/audit.md for the curve."""
    found = []
    for effect in (0.2, 0.4, 0.6):
        contributions = rng.standard_normal((100, 1, 2000))
        contributions[:, :, :200] -= effect
        q = table_of(contributions, torch.eye(2000), ResamplingConfig(n_flips=1999, n_halves=1))["q_value"]
        found.append(np.mean(q[:200] <= 0.05))
        assert np.mean(q[200:] <= 0.05) < 0.02
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.95


def test_halves_agree_where_there_is_an_effect(rng):
    gradient = rng.standard_normal((60, 1, 4))
    gradient[:, :, 0] -= 2
    agreement = table_of(gradient, torch.eye(4))["split_half_agreement"]
    assert agreement[0] == 1
    assert agreement[1:].max() < 0.95


def test_length_control_takes_away_what_is_length(rng):
    difference = rng.normal(4, 8, size=200)
    length = np.stack([50 + difference, np.full(200, 50)], axis=1).round()
    difference = length[:, 0] - length[:, 1]
    gradient = rng.standard_normal((200, 2, 2))
    gradient[:, 0, 0] -= difference
    gradient[:, 0, 1] -= 3
    table = table_of(gradient, torch.eye(2), length=length)
    assert table["length_correlation"][0] > 0.95
    assert (table["q_value"] < 1e-3).all()
    assert table["length_q_value"][0] > 0.01
    assert table["length_q_value"][1] < 1e-6
    np.testing.assert_allclose(table["attribution_at_equal_length"][1], 3, atol=0.5)


def test_a_dead_direction_has_no_attribution_and_no_significance(rng):
    directions = unit(rng, 3, 6)
    directions[1] = 0
    table = table_of(rng.standard_normal((30, 2, 6)), directions)
    assert table["attribution"][1] == 0
    assert table["p_value"][1] == 1
    assert np.isfinite(benjamini_hochberg(table["p_value"])).all()
