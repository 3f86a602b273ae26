"""A coefficient per flagged feature that sets itself: what the reward pays for it, and what holds it at its target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from .errors import AuditError
from .flags import Flag
from .penalties import Penalty

_PRIOR = 64.0
"""Responses' worth of belief that scores are uncorrelated, of unit variance and unpaid: what few responses show is mostly
chance."""
_LARGEST_PAYMENT = 1.0
"""Of a reward for a score, in units of both their spreads: a correlation is no larger."""


class AdaptivePenalty(Penalty):
    """Makes the shaped reward push each flagged feature to its target, whatever the reward pays for it.

        p = σ·Σ_f λ_f·(clip(s_f, ±score_clip) − τ_f)

    A policy-gradient step moves the mean of a score by its covariance with the reward (the natural gradient exactly, others
    up to a positive matrix). So the coefficients are chosen, after every batch, for a wanted covariance u:

        λ ≥ 0  nearest to solving  Cov(s, r − p) = −σ·u
        u_f = w_f·(proportional·e_f + I_f)      e_f = clip(s̄_f − τ_f, ±error_clip)
        I_f ← clip(I_f + integral·e_f, ±1)

    With u = 0 this takes off just what the reward pays for the features, flags that fire together counted once; u pulls a
    feature back in proportion to its distance from the target; and I finds what remains, from a KL term say. `s̄_f` is the
    batch's mean of the clipped score over all processes, σ the reward's running spread, w the flags' weights over their
    mean. Covariances are taken within batches, over about the last `memory` responses.

    Why these defaults: a correlation is at most 1, so with `proportional=2` no reward can hold a feature further than half a
    standard deviation above its target even if nothing else were known of what it pays. An integral alone, or a fast one,
    makes a policy oscillate: the policy itself integrates the reward; `integral` is therefore a twentieth of
    `proportional`. λ stays in [0, maximum], all flags together, so it never pays for a feature; I stays where it is while
    λ_f = 0 and the feature is below its target, so it does not wind up.

    Scores should be calibrated: the gains are meant for z-scores.

    Args:
        target: τ. "reference" is the calibration mean, a z-score of 0; or a number; or label → number.
        proportional: the pull back, per score unit above the target, in units of the reward's spread.
        integral: how much a batch that is one score unit off moves I.
        maximum: largest sum of λ, in units of the reward's spread per score unit.
        memory: responses over which what the reward pays is estimated.
        error_clip: largest deviation one batch may report.
        score_clip: scores beyond count as this much, in penalty and control alike. A feature that the reference shows in a
            share q of its responses has scores up to about 1/√q, which the clip must let through.
        decay: of the running spread, per batch.

    Raises:
        AuditError: for a value that cannot be meant.
    """

    def __init__(
        self,
        target: str | float | Mapping[str, float] = "reference",
        *,
        proportional: float = 2.0,
        integral: float = 0.1,
        maximum: float = 5.0,
        memory: float = 512.0,
        error_clip: float = 1.0,
        score_clip: float = 10.0,
        decay: float = 0.99,
    ) -> None:
        super().__init__(decay)
        if isinstance(target, str) and target != "reference":
            raise AuditError(f"The target is {target!r}; give 'reference', a number, or label → number.")
        for name, value in (
            ("maximum", maximum),
            ("memory", memory),
            ("error_clip", error_clip),
            ("score_clip", score_clip),
        ):
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
        self.score_clip = score_clip
        self._targets = np.zeros(0)
        self._lambdas = np.zeros(0)
        self._offset = np.zeros(0)
        self._seen = 0.0
        self._variance = np.zeros((0, 0))
        self._paid = np.zeros(0)

    def bind(self, flags: Sequence[Flag]) -> None:
        super().bind(flags)
        self._targets = np.array([self._target_of(flag) for flag in flags])
        if (np.abs(self._targets) > self.score_clip).any():
            raise AuditError(
                f"Target {np.abs(self._targets).max()} is beyond score_clip={self.score_clip}, so no clipped score can reach "
                "it; choose a nearer target or a larger score_clip."
            )
        if isinstance(self.target, dict):
            unknown = set(self.target) - {flag.name for flag in flags}
            if unknown:
                raise AuditError(
                    f"There are targets for {', '.join(sorted(map(repr, unknown)))}, which are no labels of the flags; "
                    f"the flags are {', '.join(repr(flag.name) for flag in flags)}."
                )
        if len(self._lambdas) != len(flags):
            k = len(flags)
            self._lambdas, self._offset, self._paid = np.zeros(k), np.zeros(k), np.zeros(k)
            self._variance = np.zeros((k, k))

    def coefficients(self) -> list[float]:
        """λ_f·σ: what one score unit costs in units of the reward."""
        return (self._lambdas * self.spread).tolist()

    def __call__(self, scores: Tensor) -> Tensor:
        costs = torch.tensor(self.coefficients(), dtype=torch.float64)
        return (self._bounded(scores.double()) - torch.from_numpy(self._targets)) @ costs

    def settings(self) -> dict[str, Any]:
        names = (
            "target",
            "proportional",
            "integral",
            "maximum",
            "memory",
            "error_clip",
            "score_clip",
            "decay",
        )
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "lambdas": self._lambdas.tolist(),
            "offset": self._offset.tolist(),
            "seen": self._seen,
            "variance": self._variance.tolist(),
            "paid": self._paid.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        k = len(state["lambdas"])
        self._lambdas, self._offset = np.array(state["lambdas"]), np.array(state["offset"])
        self._seen = float(state["seen"])
        self._variance, self._paid = np.array(state["variance"]).reshape(k, k), np.array(state["paid"])

    def _bounded(self, scores: Tensor) -> Tensor:
        return scores.clamp(-self.score_clip, self.score_clip)

    def _shown(self, scores: Tensor, rewards: Tensor) -> list[float]:
        scores = self._bounded(scores)
        sums = (scores.sum(0), scores.T @ rewards, (scores.T @ scores).flatten())
        return torch.cat(sums).tolist()

    def _move(self, count: float, mean_reward: float, shown: list[float]) -> None:
        k = len(self._targets)
        if k == 0:
            return
        mean = np.array(shown[:k]) / count
        kept = math.exp(-count / self.memory)
        self._seen = kept * self._seen + count
        self._paid = kept * self._paid + shown[k : 2 * k] - count * mean * mean_reward
        self._variance = kept * self._variance + np.reshape(shown[2 * k :], (k, k))
        self._variance -= count * np.outer(mean, mean)
        error = np.clip(mean - self._targets, -self.error_clip, self.error_clip)
        idle = (self._lambdas == 0) & (error < 0)
        self._offset = np.clip(
            self._offset + np.where(idle, 0.0, self.integral * error), -_LARGEST_PAYMENT, _LARGEST_PAYMENT
        )
        weights = self.weights.numpy() / self.weights.numpy().mean()
        self._lambdas = coefficients_for(
            weights * (self.proportional * error + self._offset),
            self._paid / self.spread if self.spread > 0 else np.zeros(k),
            self._variance,
            self._seen,
            self.maximum,
        )

    def _target_of(self, flag: Flag) -> float:
        if isinstance(self.target, dict):
            if flag.name not in self.target:
                raise AuditError(f"Flag {flag.name!r} has no target; add one, or pass one number for all.")
            return float(self.target[flag.name])
        if isinstance(self.target, str):
            if flag.direction == "both":
                raise AuditError(
                    f"Flag {flag.name!r} has direction 'both', whose score is the distance from the reference, which a "
                    "sampled policy never holds at 0; pass AdaptivePenalty a number as target, 1.0 say."
                )
            return 0.0
        return float(self.target)


def coefficients_for(
    wanted: np.ndarray, paid: np.ndarray, variance: np.ndarray, seen: float, maximum: float
) -> np.ndarray:
    """λ ≥ 0 nearest to C·λ = c + u, scaled down to a sum of at most `maximum`.

    Nearest in the metric of C⁻¹, that is, λ minimises ½·λᵀCλ − λᵀ(c + u). C and c are estimated with a prior of 64
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
