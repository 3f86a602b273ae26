"""The adaptive penalty: its formula against one written another way, and the controller on policies that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from trl_sae_audit import AdaptivePenalty, Flag
from trl_sae_audit.adaptive_penalty import coefficients_for

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
    rng = np.random.default_rng(seed)
    batches = []
    for size in rng.integers(5, 40, n):
        scores = rng.normal([0.5, -0.2], 1.0, (size, 2)) @ np.array([[1.0, 0.4], [0.0, 1.0]])
        batches.append((scores, 3.0 * scores @ np.array([0.5, 0.3]) + rng.normal(0, 2, size)))
    return batches


def test_it_is_its_formula() -> None:
    settings = {"proportional": 0.7, "integral": 0.1, "memory": 50.0, "error_clip": 0.4, "score_clip": 1.5}
    penalty = bound(AdaptivePenalty({"flattery": 0.2, "length": -0.1}, **settings))
    batches = history()
    offs = [batch(penalty, *each) for each in batches]
    assert not offs[0].any()
    target, weights = np.array([0.2, -0.1]), np.array([0.5, 1.5])
    offset, lambdas, sigma = np.zeros(2), np.zeros(2), 0.0
    for t, (scores, _) in enumerate(batches):
        clipped = np.clip(scores, -1.5, 1.5)
        np.testing.assert_allclose(offs[t], sigma * (clipped - target) @ lambdas, rtol=1e-4, atol=1e-7)
        past = batches[: t + 1]
        every = np.concatenate([rewards for _, rewards in past])
        ages = np.repeat(np.arange(t, -1, -1), [len(rewards) for _, rewards in past])
        mean = np.average(every, weights=0.99**ages)
        sigma = np.sqrt(np.average((every - mean) ** 2, weights=0.99**ages))
        seen, paid, variance = 0.0, np.zeros(2), np.zeros((2, 2))
        for age, (s, r) in zip(range(t, -1, -1), past, strict=True):
            s = np.clip(s, -1.5, 1.5)
            later = sum(len(rewards) for _, rewards in past[t + 1 - age :])
            kept = np.exp(-later / 50.0)
            seen += kept * len(s)
            paid += kept * len(s) * np.array([np.cov(s[:, f], r, bias=True)[0, 1] for f in range(2)])
            variance += kept * len(s) * np.cov(s.T, bias=True)
        error = np.clip(clipped.mean(0) - target, -0.4, 0.4)
        offset += np.where((lambdas == 0) & (error < 0), 0.0, 0.1 * error)
        C = (variance + 64 * np.eye(2)) / (seen + 64)
        b = paid / sigma / (seen + 64) + weights * (0.7 * error + offset)
        found = minimize(
            lambda x, C=C, b=b: 0.5 * x @ C @ x - b @ x, np.ones(2), bounds=[(0, None)] * 2, tol=1e-14
        )
        lambdas = found.x * min(1.0, 5.0 / found.x.sum())
    assert (lambdas > 0).any()


def test_it_takes_off_what_the_reward_pays() -> None:
    """At the target the shaped reward's covariance with every flagged score is what is wanted: none."""
    rng = np.random.default_rng(1)
    penalty = bound(AdaptivePenalty())
    base = rng.normal(size=(4000, 2))
    scores = np.stack([base[:, 0], 0.8 * base[:, 0] + 0.6 * base[:, 1]], 1)
    scores -= scores.mean(0)
    rewards = 10 * (scores @ np.array([0.3, 0.5]) + rng.normal(size=4000))
    batch(penalty, scores, rewards)
    left = rewards - batch(penalty, scores, rewards)
    before = [np.corrcoef(rewards, scores[:, f])[0, 1] for f in range(2)]
    after = [np.corrcoef(left, scores[:, f])[0, 1] for f in range(2)]
    assert min(before) > 0.4
    assert np.abs(after).max() < 0.03


def test_features_that_fire_together_are_counted_once_and_unpaid_ones_not_at_all() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.normal(size=(2, 3000))
    copies = np.stack([one, one + 0.05 * rng.normal(size=3000), other], 1)
    copies -= copies.mean(0)
    rewards = one + rng.normal(size=3000)
    flags = [Flag("tiny", feature) for feature in range(3)]
    many, single = bound(AdaptivePenalty(), flags), bound(AdaptivePenalty(), flags[:1])
    for penalty, scores in ((many, copies), (single, copies[:, :1])):
        batch(penalty, scores, rewards)
        penalty.begin_batch()
    twice, unpaid = sum(many.coefficients()[:2]), many.coefficients()[2]
    assert twice == pytest.approx(single.coefficients()[0], rel=0.05)
    assert unpaid < 0.05 * twice


def test_the_sum_of_coefficients_is_bounded() -> None:
    wanted = np.array([4.0, 4.0])
    found = coefficients_for(wanted, np.zeros(2), np.zeros((2, 2)), 0.0, 5.0)
    assert found == pytest.approx([2.5, 2.5])
    assert coefficients_for(-wanted, np.zeros(2), np.zeros((2, 2)), 0.0, 5.0).tolist() == [0.0, 0.0]


def bernoulli_policy(
    penalty: AdaptivePenalty, *, size: float, speed: float, leak: float = 0.0, steps: int = 300
) -> list[float]:
    """A policy that shows a behaviour with probability sigmoid(θ), from 0.4, and follows the natural policy gradient.

    The reward pays for the behaviour as much as for all else together. Two features carry it, imperfectly; `leak` moves
    θ besides what the reward does, as the gradient of another loss would.

    Returns:
        The probability after each step.
    """
    rng = np.random.default_rng(3)
    target, noise = 0.4, 0.3
    deviation = np.sqrt(target * (1 - target) + noise**2)
    theta, rates = np.log(target / (1 - target)), []
    for _ in range(steps):
        rate = 1 / (1 + np.exp(-theta))
        shows = rng.random(64) < rate
        scores = (shows[:, None] + rng.normal(0, noise, (64, 2)) - target) / deviation
        rewards = size * (shows + rng.normal(0, 0.5, 64))
        shaped = rewards - batch(penalty, scores, rewards)
        advantage = (shaped - shaped.mean()) / (shaped.std() + 1e-9)
        theta += speed * (np.mean(advantage * (shows - rate)) / (rate * (1 - rate)) + leak)
        theta = np.clip(theta, -6, 6)
        rates.append(rate)
    return rates


@pytest.mark.parametrize(("size", "speed"), [(1.0, 0.02), (1.0, 0.5), (0.01, 0.1), (1000.0, 0.1)])
def test_one_setting_holds_policies_fast_and_slow_whatever_the_size_of_the_reward(
    size: float, speed: float
) -> None:
    rates = bernoulli_policy(bound(AdaptivePenalty()), size=size, speed=speed)
    assert np.mean(rates[-100:]) == pytest.approx(0.4, abs=0.04)
    assert max(rates[10:]) < 0.65  # the first batches move before anything is known
    assert min(rates[10:]) > 0.1


def test_an_integral_alone_oscillates_and_the_default_does_not() -> None:
    """Why there is a proportional part: the policy itself integrates the reward."""

    def swing(penalty: AdaptivePenalty) -> float:
        rates = bernoulli_policy(bound(penalty), size=1.0, speed=0.2)
        return float(np.ptp(rates[50:]))

    assert swing(AdaptivePenalty(proportional=0.0, integral=0.1)) > 2 * swing(AdaptivePenalty())


def test_the_integral_finds_what_the_reward_does_not_show() -> None:
    """A push that no covariance with the reward tells of."""

    def level(penalty: AdaptivePenalty) -> float:
        return float(np.mean(bernoulli_policy(bound(penalty), size=1.0, speed=0.1, leak=0.5)[-100:]))

    assert level(AdaptivePenalty(integral=0.0)) > 0.45
    assert level(AdaptivePenalty()) == pytest.approx(0.4, abs=0.04)


def test_it_leaves_its_bounds_at_once() -> None:
    penalty = bound(AdaptivePenalty())
    rng = np.random.default_rng(4)
    noise = rng.normal(0, 0.1, (64, 2))
    rewards = rng.normal(size=64)
    for _ in range(100):
        batch(penalty, noise - 2.0, rewards)  # far below the target: nothing to do
    assert penalty.coefficients() == [0.0, 0.0]
    for _ in range(2):
        batch(penalty, noise + 0.5, rewards)
    assert min(penalty.coefficients()) > 0
    for _ in range(100):
        batch(penalty, noise + 2.0, rewards)
    assert sum(penalty.coefficients()) == pytest.approx(5.0 * penalty.spread)
    for _ in range(2):
        batch(penalty, noise - 1.5, rewards)
    assert penalty.coefficients() == [0.0, 0.0]
