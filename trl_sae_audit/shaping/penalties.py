"""How scores of flagged features become a penalty on a reward: what every penalty shares, and the fixed one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AuditError
from ..flags import Flag


class Penalty(ABC):
    """What both penalties share: the reward's running spread, and a clock that is the same on all processes.

    A batch is one call of the reward. `begin_batch` first adds up, over all processes, what the batch before
    has shown, and moves the coefficients by it; it is the only communication. So every process has the
    same coefficients, and a batch never chooses its own.

    The spread σ is the standard deviation of the inner reward, over the batches so far with weights that fall
    by `decay` a batch; 0 before the second batch.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay <= 1:
            raise AuditError(f"decay is {decay}; it must be above 0 and at most 1.")
        self.decay = decay
        self.batches = 0
        self.keys: list[str] | None = None
        self.weights = torch.ones(0, dtype=torch.float64)
        self._moments = [0.0, 0.0, 0.0]
        self._pending: list[float] | None = None

    def bind(self, flags: Sequence[Flag]) -> None:
        """Say which flags the columns of the scores are.

        Raises:
            AuditError: if the penalty already serves other flags.
        """
        keys = [f"{flag.dictionary}/{flag.feature}" for flag in flags]
        if self.keys is not None and self.keys != keys:
            raise AuditError(
                f"This {type(self).__name__} holds coefficients of {', '.join(self.keys) or 'no feature'} and was given "
                f"{', '.join(keys) or 'none'}; make a new penalty for other flags."
            )
        self.keys = keys
        self.weights = torch.tensor([flag.weight for flag in flags], dtype=torch.float64)

    @property
    def spread(self) -> float:
        """σ, the running standard deviation of the inner reward."""
        weight, first, second = self._moments
        if weight == 0:
            return 0.0
        return math.sqrt(max(0.0, second / weight - (first / weight) ** 2))

    def begin_batch(self) -> None:
        """Take in the batch before. With several processes all of them must call it."""
        if self._pending is None:
            return
        pending, self._pending = _sum_over_processes(self._pending), None
        count, first, second, *sums = pending
        self.batches += 1
        if count == 0:
            return
        self._moments = [
            self.decay * old + new for old, new in zip(self._moments, (count, first, second), strict=True)
        ]
        self._update(count, first / count, sums)

    def end_batch(self, scores: Tensor, rewards: Tensor) -> None:
        """Note what a batch showed; nothing moves until the next one begins.

        Args:
            scores: [n, k], signed: positive is what the flag objects to.
            rewards: [n], the inner rewards.
        """
        rewards = rewards.double()
        batch = [float(len(rewards)), float(rewards.sum()), float(rewards.square().sum())]
        batch += self._batch_sums(scores.double(), rewards)
        if self._pending is not None:
            batch = [a + b for a, b in zip(self._pending, batch, strict=True)]
        self._pending = batch

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """What to subtract from each reward: signed scores [n, k] → [n], float64."""

    @abstractmethod
    def coefficients(self) -> list[float]:
        """λ of each flag, as it is now."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments this was made with."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, as plain numbers; the same on all processes after `begin_batch`."""
        return {
            "kind": type(self).__name__,
            "flags": self.keys,
            "batches": self.batches,
            "moments": list(self._moments),
            "pending": self._pending,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            AuditError: the state of another kind of penalty, or of other flags; a damaged one.
        """
        try:
            self._load(state)
        except AuditError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AuditError(
                f"The saved state of a {type(self).__name__} is damaged ({type(error).__name__}: {error}); restore it from a "
                "copy, or start the coefficients from the beginning."
            ) from error

    def _load(self, state: Mapping[str, Any]) -> None:
        flags = state["flags"]
        if flags is not None and not (
            isinstance(flags, list) and all(isinstance(each, str) for each in flags)
        ):
            raise TypeError(f"its flags are {flags!r}")
        if state["kind"] != type(self).__name__:
            raise AuditError(
                f"The saved state is of {state['kind']}, and this penalty is {type(self).__name__}; use the same one."
            )
        if self.keys is not None and state["flags"] is not None and list(state["flags"]) != self.keys:
            raise AuditError(
                f"The saved coefficients are of {', '.join(state['flags']) or 'no feature'}, and the flags here are "
                f"{', '.join(self.keys) or 'none'}; use the same flags in the same order, or start from the beginning."
            )
        self.keys = None if state["flags"] is None else list(state["flags"])
        self.batches = int(finite_array(state["batches"]))
        self._moments = finite_array(state["moments"], 3).tolist()
        self._pending = None if state["pending"] is None else finite_array(state["pending"], None).tolist()

    def _batch_sums(self, scores: Tensor, rewards: Tensor) -> list[float]:
        """What a batch shows besides its rewards, as sums over responses; added up over processes."""
        return []

    def _update(self, count: float, mean_reward: float, sums: list[float]) -> None:  # noqa: B027, may do nothing
        """Adjust to a batch of `count` responses over all processes, with the sums that `_batch_sums` gave."""


def finite_array(values: Any, *shape: int | None) -> np.ndarray:
    """Saved numbers as an array, float64, of that shape (None: any length).

    Raises:
        ValueError: of another shape, or one that is not finite.
    """
    array = np.array(values, dtype=np.float64)
    if array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        raise ValueError(f"numbers of shape {shape} were expected, not {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("a number is not finite")
    return array


class FixedPenalty(Penalty):
    """A coefficient chosen by hand.

        p = clip(c·Σ_f w_f·s_f, ±clip·u)      c = λ·min(1, batches / warmup)·u

    with `u` the reward's running spread σ if `relative`, else 1. A relative penalty is 0 in the first batch,
    whose spread is not known yet.

    Args:
        coefficient: λ. Below 0 it pays for what is flagged.
        warmup: batches over which the coefficient rises from 0.
        clip: largest penalty of one response, either way; None for no bound.
        relative: measure coefficient and clip in units of the reward's spread.
        allow_negative: needed for λ < 0, which is nearly always a mistake.
        decay: of the running spread, per batch.

    Raises:
        AuditError: λ below 0 without `allow_negative`, or an invalid value.
    """

    def __init__(
        self,
        coefficient: float,
        *,
        warmup: int = 0,
        clip: float | None = None,
        relative: bool = False,
        allow_negative: bool = False,
        decay: float = 0.99,
    ) -> None:
        super().__init__(decay)
        if not math.isfinite(coefficient):
            raise AuditError(f"The coefficient is {coefficient}; give a finite number.")
        if coefficient < 0 and not allow_negative:
            raise AuditError(
                f"The coefficient is {coefficient}: a penalty below 0 rewards what is flagged. Give a positive one, or "
                "pass allow_negative=True if this is what you want."
            )
        if warmup < 0:
            raise AuditError(f"warmup is {warmup}; give a number of batches, 0 for none.")
        if clip is not None and not clip > 0:
            raise AuditError(f"clip is {clip}; give a number above 0, or None for no bound.")
        self.coefficient = coefficient
        self.warmup = warmup
        self.clip = clip
        self.relative = relative
        self.allow_negative = allow_negative

    @property
    def unit(self) -> float:
        """`u`: the reward's spread where the penalty is relative to it, else 1."""
        return self.spread if self.relative else 1.0

    def coefficients(self) -> list[float]:
        ramp = 1.0 if self.batches >= self.warmup else self.batches / self.warmup
        return [self.coefficient * ramp * self.unit] * len(self.keys or ())

    def __call__(self, scores: Tensor) -> Tensor:
        lambdas = torch.tensor(self.coefficients(), dtype=torch.float64)
        penalty = scores.double() @ (lambdas * self.weights)
        return penalty if self.clip is None else penalty.clamp(-self.clip * self.unit, self.clip * self.unit)

    def settings(self) -> dict[str, Any]:
        names = ("coefficient", "warmup", "clip", "relative", "allow_negative", "decay")
        return {name: getattr(self, name) for name in names}


def _sum_over_processes(values: list[float]) -> list[float]:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.tolist()
