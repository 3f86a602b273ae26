"""What is to become of every row of a preference dataset, decided before anything is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from .errors import AuditError
from .filter_scores import example_scores
from .flags import Flag

if TYPE_CHECKING:
    from .audit_result import Audit

STRATEGIES = ("drop", "flip", "weight", "resample")
BALANCE = "balance"
_ROUNDING = 1e-12


@dataclass(frozen=True)
class FilterPlan:
    """What is to become of every row, before anything is written.

    Attributes:
        action: "keep", "drop", "flip" or "weight" of each row [rows].
        score: what decided, NaN for a row the audit set aside [rows]; see `example_scores`. Positive = the row teaches
            what the flags object to.
        weight: 1 but for rows that are weighted down [rows].
        reason: empty but for rows that are not simply kept [rows].
        settings: what it was made from; enough to make it again.
    """

    action: np.ndarray
    score: np.ndarray
    weight: np.ndarray
    reason: list[str]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.action)

    @property
    def dropped(self) -> np.ndarray:
        """Numbers of the rows that leave."""
        return np.flatnonzero(self.action == "drop")

    @property
    def kept(self) -> np.ndarray:
        """Numbers of the rows that stay, flipped and weighted ones among them."""
        return np.flatnonzero(self.action != "drop")

    def table(self) -> pd.DataFrame:
        """One row a row of the data: row, action, score, weight, reason."""
        return pd.DataFrame(
            {
                "row": np.arange(len(self)),
                "action": self.action,
                "score": self.score,
                "weight": self.weight,
                "reason": self.reason,
            }
        )

    def control(self, seed: int) -> FilterPlan:
        """As many rows chosen at random, with the same done to them: any smaller dataset trains differently.

        Rows that the audit set aside leave here too.
        """
        unscored = np.isnan(self.score)
        chosen = np.flatnonzero((self.action != "keep") & ~unscored)
        drawn = np.random.default_rng(seed).permutation(np.flatnonzero(~unscored))[: len(chosen)]
        action = np.where(unscored, self.action, "keep")
        weight = np.ones_like(self.weight)
        reason = [text if aside else "" for text, aside in zip(self.reason, unscored, strict=True)]
        for place, source in zip(np.sort(drawn), chosen, strict=True):
            action[place], weight[place] = self.action[source], self.weight[source]
            reason[place] = "drawn at random, as a control"
        return dataclasses.replace(
            self, action=action, weight=weight, reason=reason, settings=self.settings | {"control_seed": seed}
        )


def plan_filter(audit: Audit, flags: Sequence[Flag], settings: Mapping[str, Any]) -> FilterPlan:
    """Decide about every row."""
    strategy = settings["strategy"]
    if strategy not in STRATEGIES:
        raise AuditError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    rows = audit.rows()
    score = np.full(audit.manifest["rows"], np.nan)
    score[rows] = example_scores(audit, flags, settings["score"], settings["weights"])
    selected, cutoff = select(
        score, settings["budget"], settings["threshold"], settings["quantile"], strategy
    )
    action = np.full(len(score), "keep", dtype="<U6")
    weight = np.ones(len(score))
    if strategy in ("drop", "flip"):
        action[selected] = strategy
    else:
        weight[selected] = max(cutoff, 0.0) / score[selected]
        action[selected] = "weight"
    if strategy == "resample":
        drawn = np.random.default_rng(settings["seed"]).random(len(score))
        action[selected] = np.where(drawn[selected] < weight[selected], "keep", "drop")
        weight[:] = 1.0
    names = ", ".join(flag.name for flag in flags)
    reason = [
        f"score {score[row]:.4g} for {names}" if action[row] != "keep" else "" for row in range(len(score))
    ]
    for row, problem in audit.set_aside:
        action[row], reason[row] = "drop", problem
    return FilterPlan(
        action, score, weight, reason, {**settings, "flags": [dataclasses.asdict(flag) for flag in flags]}
    )


def select(
    score: np.ndarray,
    budget: float | int | str | None,
    threshold: float | None,
    quantile: float | None,
    strategy: str = "drop",
) -> tuple[np.ndarray, float]:
    """Rows to act on, in order, and the score of the last one left alone: those above it are acted on.

    Raises:
        AuditError: none or several of the three given, or one out of range.
    """
    given = [
        name
        for name, value in (("budget", budget), ("threshold", threshold), ("quantile", quantile))
        if value is not None
    ]
    if len(given) != 1:
        raise AuditError(
            f"{' and '.join(given) or 'Nothing'} given; give exactly one of budget, threshold and quantile."
        )
    known = score[~np.isnan(score)]
    if budget == BALANCE:
        if strategy in ("drop", "flip"):
            return _highest(score, rows_to_balance(known, 1 if strategy == "drop" else 2))
        threshold = level_to_balance(known)
    elif budget is not None:
        return _highest(score, _count(budget, len(score)))
    if quantile is not None:
        if not 0 <= quantile < 1:
            raise AuditError(f"quantile is {quantile}; give a number from 0 to below 1.")
        threshold = float(np.quantile(known, quantile)) if len(known) else 0.0
    assert threshold is not None
    if math.isnan(threshold):
        raise AuditError("threshold is not a number; give one.")
    cutoff = max(threshold, 0.0)
    return np.flatnonzero(score > cutoff), cutoff


def _highest(score: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    candidates = np.flatnonzero(score > 0)
    order = candidates[np.argsort(-score[candidates], kind="stable")]
    cutoff = float(score[order[count]]) if count < len(order) else 0.0
    return np.sort(order[:count]), cutoff


def rows_to_balance(score: np.ndarray, each: int) -> int:
    """The fewest rows, highest scores first, without which the scores add up to no more than 0.

    Args:
        score: of every row [n], none NaN.
        each: how many times its score a row takes from the sum: 1 if dropped, 2 if flipped.
    """
    left = score.sum() - each * np.cumsum(np.sort(score)[::-1])
    return 0 if score.sum() <= 0 else int(np.argmax(left <= _ROUNDING * np.abs(score).sum())) + 1


def level_to_balance(score: np.ndarray) -> float:
    """The level c ≥ 0 with `Σ_i min(score_i, c) = 0`: rows above it count as much as one that has it."""
    if score.sum() <= 0:
        return float(score.max(initial=0.0))
    return float(brentq(lambda level: np.minimum(score, level).sum(), 0.0, float(score.max())))


def _count(budget: float | int | str, rows: int) -> int:
    if isinstance(budget, str):
        raise AuditError(f"budget is {budget!r}; give a number of rows, a share of them, or {BALANCE!r}.")
    if isinstance(budget, bool) or not budget > 0 or (budget >= 1 and budget != int(budget)):
        raise AuditError(f"budget is {budget}; give a number of rows, or a share of them between 0 and 1.")
    if budget >= 1:
        return int(budget)
    return math.floor(budget * rows + 1e-9)


def rule_of(settings: Mapping[str, Any]) -> str:
    """What decided how many rows, as an option of `filter`: "budget 0.05", "budget balance", "threshold 1.5"."""
    name = next(name for name in ("budget", "threshold", "quantile") if settings[name] is not None)
    value = settings[name]
    return f"{name} {value if isinstance(value, str) else format(value, 'g')}"
