"""The adaptive penalty: its formula against one written another way, and the controller on policies that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from trl_sae_audit import AdaptivePenalty, AuditError, Flag
from trl_sae_audit.shaping.adaptive import coefficients_for
from trl_sae_audit.shaping.soft_threshold import SoftThreshold, histogram

FLAGS = [Flag("tiny", 3, "flattery"), Flag("tiny", 7, "length", weight=3.0)]


def bound(penalty: AdaptivePenalty, flags: list[Flag] = FLAGS) -> AdaptivePenalty:
    penalty.bind(flags)
    return penalty


def batch(penalty: AdaptivePenalty, scores: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    penalty.begin_batch()
    off = penalty(torch.tensor(scores)).numpy()
    penalty.end_batch(torch.tensor(scores), torch.tensor(rewards))
    return off


def history(n: int = 5, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two behaviours that come together at times; the reward pays for both."""
    rng = np.random.default_rng(seed)
    batches = []
    for size in [60, *rng.integers(5, 40, n)]:
        shows = rng.random((size, 2)) < [0.5, 0.3]
        shows[:, 1] |= shows[:, 0] & (rng.random(size) < 0.4)
        scores = 2.0 * shows + rng.normal(-1, 0.4, (size, 2))
        batches.append((scores, 3.0 * shows @ np.array([0.5, 0.3]) + rng.normal(0, 1, size)))
    return batches


def ramp_by_hand(reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the ramp by trying every split of the sorted scores."""
    ends = []
    for column in reference.T:
        ordered = np.sort(column)
        best, means = -1.0, (0.0, 0.0)
        for cut in range(5, len(ordered) - 4):
            below, above = ordered[:cut], ordered[cut:]
            between = len(below) * len(above) * (above.mean() - below.mean()) ** 2
            if between > best:
                best, means = between, (below.mean(), above.mean())
        quarter = (means[1] - means[0]) / 4
        ends.append((means[0] + quarter, means[1] - quarter))
    low, high = np.array(ends).T
    return low, high


def test_it_is_its_formula() -> None:
    """Against the formula over all batches at once; bins of 0.05 are what they differ by."""
    settings = {"proportional": 0.7, "integral": 0.1, "memory": 50.0, "error_clip": 0.4}
    penalty = bound(AdaptivePenalty({"flattery": 0.2, "length": -0.1}, **settings))
    batches = history()
    offs = [batch(penalty, *each) for each in batches]
    assert not offs[0].any()
    low, high = ramp_by_hand(batches[0][0])
    ramp = [np.clip((scores - low) / (high - low), 0, 1) for scores, _ in batches]
    shown = [(q - ramp[0].mean(0)) / ramp[0].std(0) for q in ramp]
    target, weights = np.array([0.2, -0.1]), np.array([0.5, 1.5])
    offset, lambdas, sigma, largest = np.zeros(2), np.zeros(2), 0.0, 0.0
    for t, x in enumerate(shown):
        np.testing.assert_allclose(offs[t], sigma * (x - target) @ lambdas, rtol=0.1, atol=0.06)
        largest = max(largest, np.abs(offs[t]).max())
        past = [rewards for _, rewards in batches[: t + 1]]
        ages = np.repeat(np.arange(t, -1, -1), [len(rewards) for rewards in past])
        every = np.concatenate(past)
        mean = np.average(every, weights=0.99**ages)
        sigma = np.sqrt(np.average((every - mean) ** 2, weights=0.99**ages))
        seen, paid, variance = 0.0, np.zeros(2), np.zeros((2, 2))
        for index, r in enumerate(past):
            n, one = len(r), shown[index]
            kept = np.exp(-sum(map(len, past[index + 1 :])) / 50.0)
            covariance = np.cov(one.T, bias=True)
            seen += kept * n
            paid += kept * n * np.array([np.cov(one[:, f], r, bias=True)[0, 1] for f in range(2)])
            variance += kept * n * (np.diag(np.diag(covariance)) if index == 0 else covariance)
        error = np.clip(x.mean(0) - target, -0.4, 0.4)
        offset += np.where((lambdas == 0) & (error < 0), 0.0, 0.1 * error)
        C = (variance + 16 * np.eye(2)) / (seen + 16)
        b = paid / sigma / (seen + 16) + weights * (0.7 * error + offset)
        found = minimize(
            lambda v, C=C, b=b: 0.5 * v @ C @ v - b @ v, np.ones(2), bounds=[(0, None)] * 2, tol=1e-14
        )
        lambdas = found.x * min(1.0, 5.0 / found.x.sum())
    assert largest > 0.5


def test_the_soft_threshold_is_the_ramp_between_the_references_two_kinds() -> None:
    (reference, _), *_ = history()
    found = SoftThreshold.from_reference(histogram(reference))
    low, high = ramp_by_hand(reference)
    np.testing.assert_allclose(found.low, low, atol=0.1)  # two bins
    np.testing.assert_allclose(found.high, high, atol=0.1)
    x = found(reference)
    np.testing.assert_allclose(x.mean(0), 0.0, atol=0.05)
    np.testing.assert_allclose(x.std(0), 1.0, atol=0.05)
    again = SoftThreshold(**found.state())
    np.testing.assert_array_equal(again(reference), x)
    parts = histogram(reference[:20]) + histogram(reference[20:])
    np.testing.assert_array_equal(parts, histogram(reference))


@pytest.mark.parametrize("n", [1, 4, 200])
def test_a_reference_that_never_shows_it_is_one_too(n: int) -> None:
    found = SoftThreshold.from_reference(histogram(np.full((n, 1), -0.3)))
    assert found(np.array([[-0.3]]))[0, 0] == pytest.approx(0.0)
    assert found(np.array([[3.0]]))[0, 0] == pytest.approx(10.0)  # a degree of 1, in deviations of 0.1


def test_the_soft_threshold_does_not_follow_what_moves_scores_a_little() -> None:
    """A policy that writes shorter, say, has all its scores fall a little; its behaviour is what it was."""
    rng = np.random.default_rng(5)
    shows = rng.random((2000, 1)) < 0.4
    reference = 2.0 * shows + rng.normal(-1, 0.15, (2000, 1))
    found = SoftThreshold.from_reference(histogram(reference))
    later = reference - 0.3 * ~shows
    assert found(later).mean() == pytest.approx(0.0, abs=0.02)
    assert (later.mean() - reference.mean()) / reference.std() < -0.15


def test_it_takes_off_what_the_reward_pays() -> None:
    """At the target the shaped reward's covariance with every behaviour is what is wanted: none."""
    rng = np.random.default_rng(1)
    penalty = bound(AdaptivePenalty(memory=1e6))
    shows = rng.random((4000, 2)) < 0.5
    shows[:, 1] = np.where(rng.random(4000) < 0.6, shows[:, 0], shows[:, 1])
    scores = 2.0 * shows - 1 + rng.normal(0, 0.1, (4000, 2))
    rewards = 10 * (shows @ np.array([0.3, 0.5]) + rng.normal(0, 0.3, 4000))
    for _ in range(30):
        left = rewards - batch(penalty, scores, rewards)
    before = [np.corrcoef(rewards, scores[:, f])[0, 1] for f in range(2)]
    after = [np.corrcoef(left, scores[:, f])[0, 1] for f in range(2)]
    assert min(before) > 0.4
    assert np.abs(after).max() < 0.06


def test_flags_of_one_label_are_one_behaviour() -> None:
    """However many features it has, it costs the same; a behaviour that is not paid costs nothing."""
    rng = np.random.default_rng(2)
    shows = rng.random((3000, 2)) < 0.5
    scores = 2.0 * shows - 1 + rng.normal(0, 0.1, (3000, 2))
    many = np.stack([scores[:, 0], scores[:, 0] + rng.normal(0, 0.1, 3000), scores[:, 1]], 1)
    rewards = shows[:, 0] + rng.normal(0, 0.5, 3000)
    two = [Flag("tiny", 0, "agrees"), Flag("tiny", 1, "agrees"), Flag("tiny", 2, "lists")]
    offs = {}
    for flags, columns in ((two, many), (two[1:], many[:, 1:])):
        penalty = bound(AdaptivePenalty(), flags)
        batch(penalty, columns, rewards)
        offs[len(flags)] = batch(penalty, columns, rewards)
        assert penalty.behaviours == ["agrees", "lists"]
        coefficients = penalty.coefficients()
        assert len(coefficients) == len(flags)
        assert coefficients[-1] < 0.05 * coefficients[0]
    cost = {k: off[shows[:, 0]].mean() - off[~shows[:, 0]].mean() for k, off in offs.items()}
    assert cost[3] == pytest.approx(cost[2], rel=0.02)
    assert cost[3] == pytest.approx(1.0, abs=0.1)  # what the reward pays for it


def test_the_sum_of_coefficients_is_bounded() -> None:
    wanted = np.array([4.0, 4.0])
    found = coefficients_for(wanted, np.zeros(2), np.zeros((2, 2)), 0.0, 5.0)
    assert found == pytest.approx([2.5, 2.5])
    assert coefficients_for(-wanted, np.zeros(2), np.zeros((2, 2)), 0.0, 5.0).tolist() == [0.0, 0.0]


def bernoulli_policy(
    penalty: AdaptivePenalty, *, size: float, speed: float, leak: float = 0.0, steps: int = 300
) -> list[float]:
    """A policy that shows a behaviour with probability sigmoid(θ), from 0.4, and follows the policy gradient with momentum
    0.9. The reward pays for the behaviour as much as for all else together. Two features carry it; `leak` moves θ besides
    what the reward does, as the gradient of another loss would.

    Returns:
        The probability after each step.
    """
    rng = np.random.default_rng(3)
    theta, momentum, rates = np.log(0.4 / 0.6), 0.0, []

    def responses(rate: float, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shows = rng.random(n) < rate
        scores = 2.0 * shows[:, None] - 0.8 + rng.normal(0, 0.3, (n, 2))
        return shows, scores, size * (shows + (rng.random(n) < 0.5))

    _, scores, rewards = responses(0.4, 2000)
    batch(penalty, scores, rewards)
    for step in range(steps):
        rate = 1 / (1 + np.exp(-theta))
        shows, scores, rewards = responses(rate, 64)
        shaped = rewards - batch(penalty, scores, rewards)
        advantage = (shaped - shaped.mean()) / (shaped.std() + 1e-9)
        gradient = np.mean(advantage * (shows - rate)) / (rate * (1 - rate)) + leak
        momentum = 0.9 * momentum + 0.1 * gradient
        theta = np.clip(theta + speed * momentum / (1 - 0.9 ** (step + 1)), -6, 6)
        rates.append(float(rate))
    return rates


BOTH = [Flag("tiny", 3, "flattery"), Flag("tiny", 7, "flattery")]


@pytest.mark.parametrize(("size", "speed"), [(1.0, 0.02), (1.0, 0.3), (0.01, 0.1), (1000.0, 0.1)])
def test_one_setting_holds_policies_fast_and_slow_whatever_the_size_of_the_reward(
    size: float, speed: float
) -> None:
    plain = bernoulli_policy(bound(AdaptivePenalty(maximum=1e-9), BOTH), size=size, speed=speed)
    assert plain[-1] > 0.9
    rates = bernoulli_policy(bound(AdaptivePenalty(), BOTH), size=size, speed=speed)
    assert np.mean(rates[-100:]) == pytest.approx(0.4, abs=0.04)
    assert max(rates) < 0.62
    assert min(rates) > 0.22


def test_an_integral_alone_oscillates_and_the_default_does_not() -> None:
    """Why there is a proportional part: the policy itself integrates the reward."""

    def swing(penalty: AdaptivePenalty) -> float:
        rates = bernoulli_policy(bound(penalty, BOTH), size=1.0, speed=0.1)
        return float(np.ptp(rates[50:]))

    assert swing(AdaptivePenalty(proportional=0.0, integral=0.1)) > 2 * swing(AdaptivePenalty())


def test_the_integral_finds_what_the_reward_does_not_show() -> None:
    """A push that no covariance with the reward tells of."""

    def level(penalty: AdaptivePenalty) -> float:
        rates = bernoulli_policy(bound(penalty, BOTH), size=1.0, speed=0.1, leak=1.0)
        return float(np.mean(rates[-100:]))

    assert level(AdaptivePenalty(integral=0.0)) > 0.46
    assert level(AdaptivePenalty()) == pytest.approx(0.4, abs=0.04)


def test_it_leaves_its_bounds_at_once() -> None:
    penalty = bound(AdaptivePenalty())
    (reference, rewards), *_ = history()
    rewards = np.random.default_rng(4).normal(size=len(rewards))  # that pay for nothing
    batch(penalty, reference, rewards)
    for _ in range(100):
        batch(penalty, reference - 9.0, rewards)  # far below the target: nothing to do
    assert penalty.coefficients() == [0.0, 0.0]
    for _ in range(2):
        batch(penalty, reference + 9.0, rewards)
    assert min(penalty.coefficients()) > 0
    for _ in range(100):
        batch(penalty, reference + 9.0, rewards)
    assert float(penalty.state_dict()["lambdas"][0] + penalty.state_dict()["lambdas"][1]) == pytest.approx(
        5.0
    )
    for _ in range(2):
        batch(penalty, reference - 9.0, rewards)
    assert penalty.coefficients() == [0.0, 0.0]


@pytest.mark.parametrize("target", [None, "level", float("nan"), [0.5], {"x": None}, {"x": float("inf")}])
def test_a_target_that_is_no_number_is_refused(target: Any) -> None:
    with pytest.raises(AuditError, match="target"):
        AdaptivePenalty(target)
