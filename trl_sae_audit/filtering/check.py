"""What the kept rows would teach: the audit's lookahead again, on them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..data.opener import DatasetLike
from ..flags import Flag
from .plan import FilterPlan, spread_evenly
from .rows import iterate_kept

if TYPE_CHECKING:
    from ..audit.result import Audit

_ENDS = ("", "_low", "_high")
_COLUMNS = [f"{when}{end}" for when in ("before", "after") for end in _ENDS]
_MOST, _SHOWN = 10, 4
_LONGEST = 32
"""Characters of a feature's words in a sentence."""


@dataclass(frozen=True)
class FilterCheck:
    """What an optimizer step does to every feature in the model's own answers, on all rows (before) and on the kept ones (after).

    Attributes:
        features: one row a feature, in the dictionary's order: feature, before and after, effect sizes as in
            `Audit.features`, each with its 95 % interval (before_low, before_high, after_low, after_high), and words.
        flags: that were filtered by.
        pairs: of the kept rows, on which the step was taken.
    """

    features: pd.DataFrame
    flags: tuple[Flag, ...]
    pairs: int

    @property
    def flagged(self) -> pd.DataFrame:
        """The rows of the flags, in their order, with their labels."""
        found = self.features.iloc[[flag.feature for flag in self.flags]]
        return found.assign(label=[flag.label for flag in self.flags])

    @property
    def remaining(self) -> list[Flag]:
        """The flags whose features are still predicted to move in the direction that they object to."""
        return [
            flag
            for flag in self.flags
            if flag.signed(np.sign(self.features["after_low"][flag.feature])) > 0
            and flag.signed(np.sign(self.features["after_high"][flag.feature])) > 0
        ]

    @property
    def risen(self) -> pd.DataFrame:
        """Other features that the kept rows strengthen, and clearly more than all rows would; the largest rise first."""
        others = self.features.drop(index=[flag.feature for flag in self.flags])
        risen = others[(others["after_low"] > 0) & (others["after_low"] > others["before_high"])]
        return risen.iloc[np.argsort(-(risen["after"] - risen["before"]).to_numpy(), kind="stable")]

    def moving(self, when: str) -> int:
        """How many features not flagged are predicted to move, "before" or "after": 0 is outside their interval."""
        others = self.features.drop(index=[flag.feature for flag in self.flags])
        return int(((others[f"{when}_low"] > 0) | (others[f"{when}_high"] < 0)).sum())

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        columns = ["feature", *_COLUMNS]
        return {
            "pairs": self.pairs,
            "flags": self.flagged[[*columns, "label"]].to_dict("records"),
            "remaining": [flag.feature for flag in self.remaining],
            "others_moving": {when: self.moving(when) for when in ("before", "after")},
            "risen": self.risen.head(_MOST)[[*columns, "words"]].to_dict("records"),
            "risen_count": len(self.risen),
        }

    def __str__(self) -> str:
        return "\n".join([self.flagged.to_string(index=False), *describe_check(self.to_dict())])


def describe_check(found: dict[str, Any]) -> list[str]:
    """Sentences about what `FilterCheck.to_dict` holds."""
    names = [str(flag["label"] or f"feature {flag['feature']}") for flag in found["flags"]]
    left = [
        name
        for name, flag in zip(names, found["flags"], strict=True)
        if flag["feature"] in found["remaining"]
    ]
    moving = found["others_moving"]
    on = f"Predicted again on {found['pairs']:,} of the kept pairs: "
    if not any(math.isfinite(flag["after_low"]) for flag in found["flags"]):
        return [f"{on}too few to tell how the flagged features would move."]
    lines = [
        on
        + (
            f"{', '.join(left)} would still move the way that the flag rules out; flag more of what carries it, or shape the reward."
            if left
            else "no flagged feature is still predicted to move the way that its flag rules out."
        ),
        f"Other features beyond their interval: {moving['before']} before, {moving['after']} after.",
    ]
    if found["risen_count"]:
        shown = ", ".join(map(_describe_risen, found["risen"][:_SHOWN]))
        lines.append(
            f"Clearly stronger than before: {found['risen_count']} not flagged{', first ' if found['risen_count'] > _SHOWN else ': '}{shown}. Read them: pressure that is taken off one "
            "feature may move to another."
        )
    return lines


def _describe_risen(row: dict[str, Any]) -> str:
    words = row.get("words") or ""
    quoted = (
        f" “{words if len(words) <= _LONGEST else words[: _LONGEST - 1].rstrip() + '…'}”" if words else ""
    )
    return f"{row['feature']}{quoted} ({row['before']:+.2g} to {row['after']:+.2g})"


def predict_again(
    audit: Audit, dataset: DatasetLike, flags: Sequence[Flag], plan: FilterPlan
) -> FilterCheck | None:
    """The audit's lookahead on the kept rows; None where the audit has none at hand that sampled answers, or took its step on none of them.

    A weighted row stands in the step as often as its weight says, in proportion and evenly along the scores.
    """
    if not audit.can_predict:
        return None
    copies = plan.copies
    if plan.settings["strategy"] == "weight":
        copies = spread_evenly(plan.weight * (copies > 0), np.argsort(-np.nan_to_num(plan.score)))
    kept = (
        row
        for row in iterate_kept(dataset, plan, plan.settings["weight_column"])
        for _ in range(1 if plan.settings["strategy"] != "weight" else int(copies[row.index]))
    )
    found, pairs = audit.predict_on(kept)
    if not pairs:
        return None
    before = audit.features().sort_values("feature", ignore_index=True)
    table: dict[str, Any] = {"feature": before["feature"].to_numpy()}
    for end in _ENDS:
        table[f"before{end}"] = before[f"effect_size{end}"].to_numpy()
    for end in _ENDS:
        table[f"after{end}"] = found[f"effect_size{end}"]
    table["words"] = before["words"].to_numpy()
    return FilterCheck(pd.DataFrame(table), tuple(flags), pairs)
