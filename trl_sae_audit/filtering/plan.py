"""What happens to every row of a preference dataset, decided before anything is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from ..errors import AuditError
from ..flags import Flag
from .balance import kept_shares, spread_evenly
from .scores import example_scores

if TYPE_CHECKING:
    from ..audit.result import Audit

Strategy = Literal["drop", "flip", "weight", "resample"]
STRATEGIES = get_args(Strategy)
BALANCE = "balance"


@dataclass(frozen=True)
class FilterPlan:
    """What happens to every row.

    Attributes:
        action: "keep", "drop", "flip", "weight" or "repeat" of each row [rows].
        score: what decided, NaN for a row the audit set aside [rows]; see `example_scores`. Positive = the row teaches
            what the flags object to.
        weight: 1 but for rows that are weighted down [rows].
        copies: how often each row is in what is kept, 0 of a dropped one [rows] int64.
        reason: empty but for rows that are not simply kept [rows].
        settings: what it was made from; enough to make it again.
    """

    action: np.ndarray
    score: np.ndarray
    weight: np.ndarray
    copies: np.ndarray
    reason: list[str]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.action)

    @property
    def dropped(self) -> np.ndarray:
        """Numbers of the dropped rows."""
        return np.flatnonzero(self.action == "drop")

    @property
    def kept(self) -> np.ndarray:
        """Numbers of the kept rows, flipped and weighted ones included, each as often as it is kept."""
        return np.repeat(np.arange(len(self)), self.copies)

    @property
    def factor(self) -> np.ndarray:
        """How much each row counts in what is kept, below 0 where it is flipped [rows]."""
        return self.copies * np.where(self.action == "flip", -1.0, self.weight)

    def table(self) -> pd.DataFrame:
        """One row a row of the data: row, action, score, weight, copies, reason."""
        return pd.DataFrame(
            {
                "row": np.arange(len(self)),
                "action": self.action,
                "score": self.score,
                "weight": self.weight,
                "copies": self.copies,
                "reason": self.reason,
            }
        )

    def control(self, seed: int) -> FilterPlan:
        """As many rows chosen at random, with the same done to them: any smaller dataset trains differently.

        Rows that the audit set aside are dropped here too.
        """
        unscored = np.isnan(self.score)
        chosen = np.flatnonzero((self.action != "keep") & ~unscored)
        drawn = np.random.default_rng(seed).permutation(np.flatnonzero(~unscored))[: len(chosen)]
        action = np.where(unscored, self.action, "keep")
        weight = np.ones_like(self.weight)
        copies = np.where(unscored, self.copies, 1)
        reason = [text if aside else "" for text, aside in zip(self.reason, unscored, strict=True)]
        for place, source in zip(np.sort(drawn), chosen, strict=True):
            action[place], weight[place] = self.action[source], self.weight[source]
            copies[place] = self.copies[source]
            reason[place] = "drawn at random, as a control"
        return dataclasses.replace(
            self,
            action=action,
            weight=weight,
            copies=copies,
            reason=reason,
            settings=self.settings | {"control_seed": seed},
        )


def plan_filter(audit: Audit, flags: Sequence[Flag], settings: Mapping[str, Any]) -> FilterPlan:
    """Decide about every row.

    Raises:
        AuditError: options that contradict each other; nothing would be kept.
    """
    strategy = settings["strategy"]
    if strategy not in STRATEGIES:
        raise AuditError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    rows = audit.rows()
    known = example_scores(audit, flags, settings["score"], settings["weights"])
    shares = _shares(known, settings, audit.manifest["rows"])
    order = np.argsort(-known, kind="stable")
    action = np.full(audit.manifest["rows"], "keep", dtype="<U6")
    score = np.full(len(action), np.nan)
    weight, copies = np.ones(len(action)), np.ones(len(action), np.int64)
    score[rows] = known
    if strategy == "drop":
        copies[rows] = 1 - spread_evenly(1 - shares, order)
        action[copies == 0] = "drop"
    elif strategy == "flip":
        half = 2 if settings["budget"] == BALANCE else 1  # a flipped row counts twice against its like
        action[rows[spread_evenly((1 - shares) / half, order) > 0]] = "flip"
    elif strategy == "weight":
        weight[rows] = shares
        action[weight < 1] = "weight"
    else:
        copies[rows] = spread_evenly(shares * len(shares) / max(shares.sum(), 1e-300), order)
        action[copies != 1] = "repeat"
        action[copies == 0] = "drop"
    names = ", ".join(flag.name for flag in flags)
    reason = [
        f"score {score[row]:.4g} for {names}" if action[row] != "keep" else "" for row in range(len(score))
    ]
    for row, problem in audit.set_aside:
        action[row], copies[row], reason[row] = "drop", 0, problem
    if not copies.any() or not weight.any():
        raise AuditError(
            f"Every row teaches what is flagged ({names}), so nothing would be kept. Shape the margin or the reward by the flags "
            "instead (shape_preference_margin, ShapedReward), drop fewer with budget=, or flag less."
        )
    flagged = [dataclasses.asdict(flag) for flag in flags]
    return FilterPlan(action, score, weight, copies, reason, {**settings, "flags": flagged})


def _shares(score: np.ndarray, settings: Mapping[str, Any], rows: int) -> np.ndarray:
    """How much of each scored row stays [n]; 0 for what is dropped or flipped by a budget, threshold or quantile."""
    if settings["budget"] == BALANCE:
        one_rule(settings)
        return kept_shares(score)
    selected, cutoff = select(score, settings["budget"], settings["threshold"], settings["quantile"], rows)
    shares = np.ones(len(score))
    shares[selected] = 0.0 if settings["strategy"] in ("drop", "flip") else max(cutoff, 0.0) / score[selected]
    return shares


def one_rule(settings: Mapping[str, Any]) -> str:
    """Which of budget, threshold and quantile is given.

    Raises:
        AuditError: not exactly one.
    """
    given = [name for name in ("budget", "threshold", "quantile") if settings[name] is not None]
    if len(given) != 1:
        raise AuditError(f"{' and '.join(given) or 'Nothing'} given; give only one of them.")
    return given[0]


def select(
    score: np.ndarray,
    budget: float | int | str | None,
    threshold: float | None,
    quantile: float | None,
    rows: int | None = None,
) -> tuple[np.ndarray, float]:
    """Rows to act on, in order, and the score of the last one left alone: those above it are acted on.

    Args:
        score: of each [n], none NaN.
        rows: of which a budget below 1 is a share; by default n.

    Raises:
        AuditError: none or several of the three given, or one out of range.
    """
    one_rule({"budget": budget, "threshold": threshold, "quantile": quantile})
    if budget is not None:
        return _highest(score, _count(budget, len(score) if rows is None else rows))
    if quantile is not None:
        if not 0 <= quantile < 1:
            raise AuditError(f"quantile is {quantile}; give a number from 0 to below 1.")
        threshold = float(np.quantile(score, quantile)) if len(score) else 0.0
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


def _count(budget: float | int | str, rows: int) -> int:
    if isinstance(budget, str):
        raise AuditError(f"budget is {budget!r}; give a number of rows, a share of them, or {BALANCE!r}.")
    if isinstance(budget, bool) or not budget > 0 or (budget >= 1 and budget != int(budget)):
        raise AuditError(f"budget is {budget}; give a number of rows, or a share of them between 0 and 1.")
    if budget >= 1:
        return int(budget)
    return math.floor(budget * rows + 1e-9)


def describe_rule(settings: Mapping[str, Any]) -> str:
    """What decided how many rows, as an option of `filter`: "budget 0.05", "budget balance", "threshold 1.5"."""
    name = one_rule(settings)
    value = settings[name]
    return f"{name} {value if isinstance(value, str) else format(value, 'g')}"
