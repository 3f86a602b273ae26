"""A coefficient per flagged behaviour that sets itself: what the reward pays for it, and what holds it at its target."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from ..errors import AuditError
from ..flags import Flag
from .penalties import Penalty, finite_array
from .soft_threshold import BIN_CENTRES, SoftThreshold, histogram

_PRIOR = 16.0
"""Responses' worth of belief that scores are uncorrelated, of unit variance and unpaid: what few responses show is mostly
chance."""
_LARGEST_PAYMENT = 1.0
"""Of a reward for a score, in units of both their spreads: a correlation is no larger."""


class AdaptivePenalty(Penalty):
    """Makes the shaped reward push each flagged behaviour to its target, whatever the reward pays for it.

    Flags with the same label are one behaviour: a dictionary often has several features for it, and a policy that is kept from
    one wording takes another. Its **degree** in a response, 0 to 1, is read from all of them, by a soft threshold between the two kinds of
    responses that the reference gives, those that show it and those that do not:

        S_b = Σ_f w_f·s_f / Σ_f w_f            over the behaviour's flags
        q_b = clip((S_b − low_b) / (high_b − low_b), 0, 1)       x_b = (q_b − mean) / sd over the reference's responses

    The reference's responses are the first batch: what `learn_from` was given, or what the policy wrote before its first
    step. They are split in two by Otsu's method, and low and high lie a quarter of the way in from the two means. Activations
    rise and fall a little with much else, a response's length say, and a policy that changes those would otherwise have
    the behaviour itself allowed or forbidden more.

        p = σ·Σ_b λ_b·(x_b − τ_b)

    A policy-gradient step moves the mean of x by its covariance with the reward (the natural gradient exactly, others up to
    a positive matrix). So the coefficients are chosen, after every batch, for a wanted covariance u:

        λ ≥ 0  nearest to solving  Cov(x, r − p) = −σ·u
        u_b = w_b·(proportional·e_b + I_b)      e_b = clip(x̄_b − τ_b, ±error_clip)
        I_b ← clip(I_b + integral·e_b, ±1)

    With u = 0 this takes off just what the reward pays for the behaviours; u pulls one back in proportion to its distance from
    the target; and I finds what remains, from a KL term say. `x̄_b` is the batch's mean over all processes, σ the reward's
    running spread, w_b the mean weight of b's flags over that of all behaviours. Covariances are taken within batches, over
    about the last `memory` responses.

    Why these defaults: a correlation is at most 1, so with `proportional=2` no reward can hold a behaviour further than half
    a standard deviation above its target even if nothing else were known of what it pays. An integral alone, or a fast one,
    makes a policy oscillate, for the policy itself integrates the reward, and its optimizer's momentum (0.9 in Adam) answers
    about ten steps late: `integral` stays well below `proportional`/10. λ stays in [0, maximum], all behaviours together, so
    it never pays for one; I stays where it is while λ_b = 0 and the behaviour below its target, so nothing winds up.

    The first batch itself is not shaped; `learn_from` some hundred responses of the reference before training, and the
    first step is.

    Args:
        target: τ, in the reference's standard deviations of the degree. "reference" is 0, the reference's own level; or a
            number; or label → number.
        proportional: the pull back, per unit of x above the target, in units of the reward's spread.
        integral: how much a batch that is one unit off moves I.
        maximum: largest sum of λ, in units of the reward's spread per unit of x.
        memory: responses over which what the reward pays is estimated.
        error_clip: largest deviation one batch may report.
        decay: of the running spread, per batch.

    Raises:
        AuditError: for an invalid value.
    """

    def __init__(
        self,
        target: Literal["reference"] | float | Mapping[str, float] = "reference",
        *,
        proportional: float = 2.0,
        integral: float = 0.05,
        maximum: float = 5.0,
        memory: float = 512.0,
        error_clip: float = 1.0,
        decay: float = 0.99,
    ) -> None:
        super().__init__(decay)
        targets = (
            target.values() if isinstance(target, Mapping) else [0.0 if target == "reference" else target]
        )
        if not all(isinstance(each, numbers.Real) and math.isfinite(each) for each in targets):
            raise AuditError(
                f"The target is {target!r}; give 'reference', a finite number, or label → number."
            )
        for name, value in (("maximum", maximum), ("memory", memory), ("error_clip", error_clip)):
            if not 0 < value < math.inf:
                raise AuditError(f"{name} is {value}; it must be a finite number above 0.")
        for name, value in (("proportional", proportional), ("integral", integral)):
            if not 0 <= value < math.inf:
                raise AuditError(f"{name} is {value}; it must be a finite number, 0 or above.")
        self.target = dict(target) if isinstance(target, Mapping) else target
        self.proportional = proportional
        self.integral = integral
        self.maximum = maximum
        self.memory = memory
        self.error_clip = error_clip
        self.behaviours: list[str] = []
        self.threshold: SoftThreshold | None = None
        self._mixing = np.zeros((0, 0))
        self._priorities = np.zeros(0)
        self._targets = np.zeros(0)
        self._lambdas = np.zeros(0)
        self._offset = np.zeros(0)
        self._seen = 0.0
        self._variance = np.zeros((0, 0))
        self._paid = np.zeros(0)

    def bind(self, flags: Sequence[Flag]) -> None:
        super().bind(flags)
        names = [flag.name for flag in flags]
        self.behaviours = list(dict.fromkeys(names))
        self._targets = np.array([self._target_of(name) for name in self.behaviours])
        if isinstance(self.target, dict):
            unknown = set(self.target) - set(names)
            if unknown:
                raise AuditError(
                    f"There are targets for {', '.join(sorted(map(repr, unknown)))}, which are no labels of the flags; "
                    f"the flags are {', '.join(map(repr, self.behaviours))}."
                )
        member = np.array(
            [[name == behaviour for behaviour in self.behaviours] for name in names], dtype=float
        )
        member = member.reshape(len(names), len(self.behaviours))
        weighted = member * self.weights.numpy()[:, None]
        self._mixing = weighted / weighted.sum(0)
        priorities = weighted.sum(0) / member.sum(0)
        self._priorities = priorities / priorities.mean() if len(priorities) else priorities
        if len(self._lambdas) != len(self.behaviours):
            k = len(self.behaviours)
            self._lambdas, self._offset, self._paid = np.zeros(k), np.zeros(k), np.zeros(k)
            self._variance = np.zeros((k, k))

    def coefficients(self) -> list[float]:
        """What one score unit of each flag costs in units of the reward, between `low` and `high`."""
        if self.threshold is None:
            return [0.0] * len(self._mixing)
        return (self._mixing @ (self._lambdas * self.spread * self.threshold.slope)).tolist()

    def __call__(self, scores: Tensor) -> Tensor:
        if self.threshold is None:
            return torch.zeros(len(scores), dtype=torch.float64)
        x = self.threshold(scores.double().numpy() @ self._mixing)
        return torch.from_numpy((x - self._targets) @ (self._lambdas * self.spread))

    def settings(self) -> dict[str, Any]:
        names = ("target", "proportional", "integral", "maximum", "memory", "error_clip", "decay")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "threshold": None if self.threshold is None else self.threshold.state(),
            "lambdas": self._lambdas.tolist(),
            "offset": self._offset.tolist(),
            "seen": self._seen,
            "variance": self._variance.tolist(),
            "paid": self._paid.tolist(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        k = len(state["lambdas"])
        threshold = state["threshold"]
        if threshold is not None:
            if not isinstance(threshold, Mapping):
                raise TypeError(f"its threshold is {threshold!r}")
            threshold = SoftThreshold(**{name: finite_array(values, k) for name, values in threshold.items()})
            if not ((threshold.high > threshold.low).all() and (threshold.deviation > 0).all()):
                raise ValueError("a soft threshold has no width")
        self.threshold = threshold
        self._lambdas, self._offset = finite_array(state["lambdas"], k), finite_array(state["offset"], k)
        self._seen = float(finite_array(state["seen"]))
        self._variance, self._paid = finite_array(state["variance"], k, k), finite_array(state["paid"], k)

    def _batch_sums(self, scores: Tensor, rewards: Tensor) -> list[float]:
        mixed, values = scores.numpy() @ self._mixing, rewards.numpy()
        if self.threshold is None:
            return np.concatenate([histogram(mixed), histogram(mixed, values)]).ravel().tolist()
        x = self.threshold(mixed)
        return np.concatenate([x.sum(0), x.T @ values, (x.T @ x).ravel()]).tolist()

    def _update(self, count: float, mean_reward: float, sums: list[float]) -> None:
        k = len(self.behaviours)
        if k == 0:
            return
        if self.threshold is None:
            counts, rewards = np.array(sums).reshape(2, k, -1)
            self.threshold = SoftThreshold.from_reference(counts)
            x = self.threshold(BIN_CENTRES[:, None].repeat(k, 1)).T
            mean, paid = (counts * x).sum(1) / count, (rewards * x).sum(1)
            # what histograms do not tell is taken for none: covariances between behaviours
            variance = np.diag((counts * x**2).sum(1) - count * mean**2)
        else:
            mean, paid = np.array(sums[:k]) / count, np.array(sums[k : 2 * k])
            variance = np.reshape(sums[2 * k :], (k, k)) - count * np.outer(mean, mean)
        kept = math.exp(-count / self.memory)
        self._seen = kept * self._seen + count
        self._paid = kept * self._paid + paid - count * mean * mean_reward
        self._variance = kept * self._variance + variance
        error = np.clip(mean - self._targets, -self.error_clip, self.error_clip)
        idle = (self._lambdas == 0) & (error < 0)
        self._offset = np.clip(
            self._offset + np.where(idle, 0.0, self.integral * error), -_LARGEST_PAYMENT, _LARGEST_PAYMENT
        )
        self._lambdas = coefficients_for(
            self._priorities * (self.proportional * error + self._offset),
            self._paid / self.spread if self.spread > 0 else np.zeros(k),
            self._variance,
            self._seen,
            self.maximum,
        )

    def _target_of(self, name: str) -> float:
        if isinstance(self.target, dict):
            if name not in self.target:
                raise AuditError(f"Flag {name!r} has no target; add one, or pass one number for all.")
            return float(self.target[name])
        return 0.0 if isinstance(self.target, str) else float(self.target)


def coefficients_for(
    wanted: np.ndarray, paid: np.ndarray, variance: np.ndarray, seen: float, maximum: float
) -> np.ndarray:
    """λ ≥ 0 nearest to C·λ = c + u, scaled down to a sum of at most `maximum`.

    Nearest in the metric of C⁻¹, that is, λ minimises ½·λᵀCλ − λᵀ(c + u). C and c are estimated with a prior of 16
    responses of unit variance, uncorrelated and unpaid.

    Args:
        wanted: u [k].
        paid: Σ over responses of (s − s̄)·r/σ [k].
        variance: Σ of (s − s̄)(s − s̄)ᵀ [k, k].
        seen: responses summed over.
        maximum: largest sum.
    """
    n = seen + _PRIOR
    factor = np.linalg.cholesky((variance + _PRIOR * np.eye(len(wanted))) / n)
    solution, _ = nnls(factor.T, np.linalg.solve(factor, paid / n + wanted))
    total = solution.sum()
    return solution * (maximum / total) if total > maximum else solution
