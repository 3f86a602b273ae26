"""Drift in generations against exact expectations, against plain loops, and its interval against real resampling."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from trl_sae_audit.attribution.drift import (
    AnswerActivations,
    AnswerLayout,
    Drift,
    TokenWeights,
    covered_share,
    effective_answers,
    estimate_drift,
    measure_drift,
    weigh_tokens,
)

END, TOKENS, LONGEST = 2, (0, 1, 2), 4
START = {0: 0.25, 1: 0.25, END: 0.5}
"""The start model's next token; with 4 ** LONGEST answers, each as often as it is likely, the sample is the whole truth."""
FEATURES = 5


def answers() -> list[tuple[int, ...]]:
    """Every answer, in the frequency the start model gives it."""
    found = []
    for length in range(1, LONGEST + 1):
        for answer in itertools.product(TOKENS, repeat=length):
            ends = [token == END for token in answer]
            if any(ends[:-1]) or not (ends[-1] or length == LONGEST):
                continue
            found += [answer] * round(4**LONGEST * math.prod(START[token] for token in answer))
    return found


def models(
    far: float, seed: int = 0
) -> tuple[dict[tuple[int, ...], np.ndarray], dict[tuple[int, ...], np.ndarray]]:
    """Each beginning's next-token probabilities in a model that is `far` from the start, and its activations."""
    generator = np.random.default_rng(seed)
    now, active = {}, {}
    for length in range(LONGEST + 1):
        for beginning in itertools.product(TOKENS, repeat=length):
            odds = np.array([START[token] for token in TOKENS]) * np.exp(far * generator.uniform(-1, 1, 3))
            now[beginning] = odds / odds.sum()
            active[beginning] = generator.exponential(1, FEATURES) * (generator.random(FEATURES) < 0.6)
    return now, active


def start_model() -> dict[tuple[int, ...], np.ndarray]:
    return {beginning: np.array([START[token] for token in TOKENS]) for beginning in models(0.0)[0]}


def exact_means(
    now: dict[tuple[int, ...], np.ndarray], active: dict[tuple[int, ...], np.ndarray]
) -> np.ndarray:
    """Mean activation over tokens in the answers of a model, every answer counted with its probability."""
    sums, tokens = np.zeros(FEATURES), 0.0
    for answer in set(answers()):
        probability = math.prod(now[answer[:at]][token] for at, token in enumerate(answer))
        sums += probability * sum(active[answer[: at + 1]] for at in range(len(answer)))
        tokens += probability * len(answer)
    return sums / tokens


def sample(
    now: dict[tuple[int, ...], np.ndarray],
    active: dict[tuple[int, ...], np.ndarray],
    given: list[tuple[int, ...]],
) -> tuple[AnswerLayout, AnswerActivations, np.ndarray]:
    """What a callback has of given answers, four to a prompt."""
    layout = AnswerLayout(np.arange(len(given)) // 4, np.array([len(answer) for answer in given]))
    rows = np.array([active[answer[: at + 1]] for answer in given for at in range(len(answer))])
    tokens, features = np.nonzero(rows)
    ratios = [
        math.log(now[answer[:at]][token] / START[token])
        for answer in given
        for at, token in enumerate(answer)
    ]
    activations = AnswerActivations.from_tokens((rows != 0).sum(1), features, rows[tokens, features])
    return layout, activations, np.array(ratios)


@pytest.mark.parametrize("far", [0.0, 0.3, 2.0])
def test_unclipped_estimate_is_the_exact_change(far: float) -> None:
    now, active = models(far)
    layout, activations, ratios = sample(now, active, answers())
    drift = estimate_drift(activations, layout, weigh_tokens(ratios, layout, np.inf))
    exact = exact_means(now, active) - exact_means(start_model(), active)
    assert drift.features.tolist() == list(range(FEATURES))
    np.testing.assert_allclose(drift.change, exact, atol=1e-12)
    assert (np.abs(exact).max() > 0.05) == (far > 0)


def test_clipping_changes_nothing_while_models_are_near() -> None:
    now, active = models(0.3)
    layout, _, ratios = sample(now, active, answers())
    near, free = (weigh_tokens(ratios, layout, clip) for clip in (1.5, np.inf))
    assert np.abs(layout.running_sums(ratios)).max() < 1.5
    np.testing.assert_array_equal(near.excess, free.excess)


def test_clipped_estimate_keeps_direction_and_four_fifths_of_the_size_far_away() -> None:
    shares = []
    for seed in range(20):
        now, active = models(1.5, seed)
        layout, activations, ratios = sample(now, active, answers())
        exact = exact_means(now, active) - exact_means(start_model(), active)
        drift = estimate_drift(activations, layout, weigh_tokens(ratios, layout))
        assert np.corrcoef(drift.change, exact)[0, 1] > 0.9
        shares.append((drift.change @ exact) / (exact @ exact))
    assert 0.8 < np.mean(shares) < 1.0


def slow_weights(ratios: np.ndarray, layout: AnswerLayout, clip: float) -> np.ndarray:
    """`1 + v_t` from the formula, token by token."""

    def held(value: float) -> float:
        return math.exp(min(max(value, -clip), clip))

    rows = np.split(ratios, layout.starts[1:])
    increments = [[held(sum(row[:at])) * (held(row[at]) - 1) for at in range(len(row))] for row in rows]
    means = [
        np.mean([row[at] for row in increments if at < len(row)]) for at in range(int(layout.lengths.max()))
    ]
    return np.array(
        [
            1 + sum(row[place] - means[place] for place in range(at + 1))
            for row in increments
            for at in range(len(row))
        ]
    )


def random_answers(n: int, seed: int = 0) -> tuple[AnswerLayout, AnswerActivations, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    layout = AnswerLayout(np.repeat(np.arange(n), 3), generator.integers(1, 9, 3 * n))
    dense = generator.exponential(1, (layout.n_tokens, 40)) * (generator.random((layout.n_tokens, 40)) < 0.1)
    dense[:, [3, 17]] = 0
    tokens, features = np.nonzero(dense)
    activations = AnswerActivations.from_tokens((dense != 0).sum(1), features, dense[tokens, features])
    return layout, activations, generator.normal(0, 0.8, layout.n_tokens), dense


def test_estimate_agrees_with_plain_loops() -> None:
    layout, activations, ratios, dense = random_answers(30)
    counts = slow_weights(ratios, layout, 1.5)
    weights = weigh_tokens(ratios, layout)
    np.testing.assert_allclose(1 + weights.excess, counts, rtol=1e-12, atol=1e-12)
    slow = np.array([(counts * column).sum() / counts.sum() - column.mean() for column in dense.T])
    drift = estimate_drift(activations, layout, weights)
    seen = np.flatnonzero(dense.any(0))
    assert drift.features.tolist() == seen.tolist()
    assert 3 not in seen
    np.testing.assert_allclose(drift.change, slow[seen], atol=1e-12)


def test_each_answer_alone_gives_the_same_weights_up_to_the_baseline() -> None:
    layout, _, ratios, _ = random_answers(5)
    one = AnswerLayout(np.array([0]), layout.lengths[:1])
    assert (weigh_tokens(ratios[: layout.lengths[0]], one).excess == 0).all()


def test_nothing_moved_is_nothing() -> None:
    layout, activations, ratios, _ = random_answers(10)
    drift = estimate_drift(activations, layout, weigh_tokens(0 * ratios, layout))
    assert not np.any([drift.change, drift.low, drift.high])


def drawn(n_prompts: int, generator: np.random.Generator) -> list[tuple[int, ...]]:
    population = answers()
    return [population[at] for at in generator.integers(0, len(population), 4 * n_prompts)]


def test_interval_is_that_of_a_bootstrap_which_computes_everything_again() -> None:
    now, active = models(0.4)
    generator = np.random.default_rng(1)
    given = drawn(40, generator)

    def estimate(prompts: np.ndarray) -> Drift:
        chosen = [given[4 * prompt + which] for prompt in prompts for which in range(4)]
        layout, activations, ratios = sample(now, active, chosen)
        return estimate_drift(activations, layout, weigh_tokens(ratios, layout))

    drift = estimate(np.arange(40))
    again = [estimate(generator.integers(0, 40, 40)).change for _ in range(400)]
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(drift.low, low, atol=0.15 * (high - low).max())
    np.testing.assert_allclose(drift.high, high, atol=0.15 * (high - low).max())


def test_interval_holds_the_exact_change() -> None:
    now, active = models(0.4)
    exact = exact_means(now, active) - exact_means(start_model(), active)
    generator = np.random.default_rng(1)
    held, changes = [], []
    for repeat in range(200):
        layout, activations, ratios = sample(now, active, drawn(40, generator))
        drift = estimate_drift(activations, layout, weigh_tokens(ratios, layout), seed=repeat)
        held.append((drift.low <= exact) & (exact <= drift.high))
        changes.append(drift.change)
    assert 0.9 < np.mean(held) < 0.98
    np.testing.assert_allclose(np.mean(changes, 0), exact, atol=0.1 * np.abs(exact).max())


def test_baseline_takes_off_the_noise_of_what_depends_on_the_place_alone() -> None:
    now, active = models(0.6)
    active = {beginning: values * 0.1 + 2.0 ** len(beginning) for beginning, values in active.items()}
    generator = np.random.default_rng(2)
    spread: dict[str, list[np.ndarray]] = {"with": [], "without": []}
    for _ in range(100):
        layout, activations, ratios = sample(now, active, drawn(40, generator))
        weights = weigh_tokens(ratios, layout)
        plain = TokenWeights(np.expm1(layout.running_sums(ratios)), 0 * weights.shared)
        spread["with"].append(estimate_drift(activations, layout, weights).change)
        spread["without"].append(estimate_drift(activations, layout, plain).change)
    assert np.std(spread["with"], 0).mean() < 0.8 * np.std(spread["without"], 0).mean()


def test_effective_answers_are_all_at_the_start_and_few_far_away() -> None:
    layout, _, ratios, _ = random_answers(30)
    assert effective_answers(0 * ratios, layout) == pytest.approx(90)
    assert effective_answers(ratios, layout) < 60
    assert effective_answers(10 * ratios, layout) < 20
    assert np.isfinite(effective_answers(500 * ratios, layout))


def test_effective_answers_agree_with_a_plain_loop() -> None:
    layout, _, ratios, _ = random_answers(12)
    rows = [np.exp(np.cumsum(row)) for row in np.split(ratios, layout.starts[1:])]
    total = 0.0
    for at in range(int(layout.lengths.max())):
        weights = np.array([row[at] for row in rows if at < len(row)])
        total += weights.sum() ** 2 / (weights**2).sum()
    assert effective_answers(ratios, layout) == pytest.approx(total / layout.n_tokens * len(rows))


def test_covered_share_is_that_of_the_answers_that_were_sampled() -> None:
    """Of the exact sample all is covered; without the answers that begin with 0, what today's model gives of the others."""
    now, active = models(1.0)
    layout, _, ratios = sample(now, active, answers())
    assert covered_share(ratios, layout) == pytest.approx(1.0)
    seen = [answer for answer in answers() if answer[0] != 0]
    layout, _, ratios = sample(now, active, seen)
    expected = (1 - now[()][0]) / (1 - START[0])
    assert covered_share(ratios, layout) == pytest.approx(expected)
    assert expected != pytest.approx(1.0)


def answers_with(
    seed: int, features: list[int], per_prompt: list[int]
) -> tuple[AnswerActivations, AnswerLayout, np.ndarray, np.ndarray]:
    """Random answers in which some of five features are active: as they are kept, and the activations and prompts token by token."""
    generator = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(len(per_prompt)), per_prompt)
    layout = AnswerLayout(prompts, generator.integers(1, 6, len(prompts)))
    rows = np.zeros((layout.n_tokens, FEATURES))
    rows[:, features] = generator.exponential(1, (layout.n_tokens, len(features))) * (
        generator.random((layout.n_tokens, len(features))) < 0.5
    )
    tokens, which = np.nonzero(rows)
    kept = AnswerActivations.from_tokens(
        np.bincount(tokens, minlength=layout.n_tokens), which, rows[tokens, which]
    )
    return kept, layout, rows, np.repeat(prompts, layout.lengths)


def test_measured_drift_is_the_difference_of_means_of_all_features_that_either_has() -> None:
    before, before_layout, old, old_prompts = answers_with(0, [0, 1, 3], [2, 3, 1, 2] * 4)
    now, now_layout, new, new_prompts = answers_with(1, [1, 3, 4], [2, 3, 1, 2] * 4)
    found = measure_drift((before, before_layout), (now, now_layout), seed=3)
    assert found.features.tolist() == [0, 1, 3, 4]
    more = measure_drift((before, before_layout), (now, now_layout), known=np.array([1, 2]), seed=3)
    assert more.features.tolist() == [0, 1, 2, 3, 4]
    assert (more.change[2], more.low[2], more.high[2]) == (0, 0, 0)
    np.testing.assert_allclose(np.delete(more.low, 2), found.low, atol=1e-12)
    expected = new.mean(0) - old.mean(0)
    np.testing.assert_allclose(found.change, expected[found.features], atol=1e-12)
    generator = np.random.default_rng(5)
    changes = []
    for _ in range(4000):
        taken = generator.integers(0, 16, 16)
        means = [
            np.concatenate([rows[prompts == prompt] for prompt in taken]).mean(0)
            for rows, prompts in ((new, new_prompts), (old, old_prompts))
        ]
        changes.append(means[0] - means[1])
    ends = np.quantile(changes, [0.025, 0.975], axis=0)[:, found.features]
    width = ends[1] - ends[0]
    np.testing.assert_allclose((found.low - ends[0]) / width, 0, atol=0.12)
    np.testing.assert_allclose((found.high - ends[1]) / width, 0, atol=0.12)


def test_measured_drift_of_more_features_than_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = answers_with(0, [0, 1, 2, 3], [2, 2]), answers_with(1, [0, 2, 3, 4], [2, 2])
    whole = measure_drift(one[:2], other[:2])
    monkeypatch.setattr("trl_sae_audit.attribution.drift._COLUMNS", 2)
    parts = measure_drift(one[:2], other[:2])
    for name in ("features", "change", "low", "high"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-12)
