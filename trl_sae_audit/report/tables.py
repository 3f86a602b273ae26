"""The features that the loss pushed up and down most, as rows of words and positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..evidence_files import Evidence
from .axes import Scale, Whisker
from .sentences import SIGNIFICANT
from .sources import Source, View
from .text import percent, plain, probability, shown, signed

_HEAD_ROWS = 10


@dataclass(frozen=True)
class HeadRow:
    """A feature among those that gained or lost most."""

    feature: int
    label: str
    hint: str
    attribution: str
    margin: str
    whisker: Whisker
    cells: list[str]
    trend: str
    trend_is_clear: bool
    q: str
    is_clear: bool


@dataclass(frozen=True)
class HeadTable:
    """Those that gained most and those that lost most, of one dictionary."""

    scale: Scale
    columns: list[tuple[str, str]]
    gained: list[HeadRow]
    lost: list[HeadRow]


def head_table(source: Source, view: View) -> HeadTable:
    """The features that the loss asked for most, and against most."""
    frame = view.features
    gained = frame[frame["attribution"] > 0].nlargest(_HEAD_ROWS, "attribution")
    lost = frame[frame["attribution"] < 0].nsmallest(_HEAD_ROWS, "attribution")
    both = pd.concat([gained, lost])
    reach = float((both["attribution"].abs() + both["margin"].fillna(0)).max()) if len(both) else 1.0
    scale = Scale.of(both["attribution"].to_numpy())
    columns = [("share", "share"), ("lift", "lift")]
    if source.sides and {"chosen", "rejected"} <= set(frame):
        columns += [("chosen", source.sides[0]), ("rejected", source.sides[1])]
    columns += [
        (name, text)
        for name, text in (
            ("length_correlation", "length corr."),
            ("disparity", "disparity"),
            ("predicted_change", "predicted"),
        )
        if name in frame
    ]

    def row(values: dict[Any, Any]) -> HeadRow:
        feature = int(values["feature"])
        evidence = source.evidence.get((view.name, feature))
        trend = values.get("trend_tau", math.nan)
        return HeadRow(
            feature,
            _without(feature, shown(values["label"] or (evidence.label if evidence else ""), 80)),
            hint(evidence) if evidence else "",
            signed(scale(values["attribution"])),
            plain(scale(values["margin"]), 2),
            Whisker.on((-reach, reach), values["attribution"], values["margin"]),
            [_cell(name, values[name], scale) for name, _ in columns],
            "–" if not math.isfinite(trend) else f"{_arrow(trend)} {signed(trend, 2)}",
            bool(values.get("trend_q_value", 1.0) < SIGNIFICANT),
            probability(values["q_value"]),
            bool(values["q_value"] < SIGNIFICANT),
        )

    return HeadTable(
        scale,
        columns,
        [row(values) for values in gained.to_dict("records")],
        [row(values) for values in lost.to_dict("records")],
    )


def _arrow(trend: float) -> str:
    return "→" if trend == 0 else "↗" if trend > 0 else "↘"


def _without(feature: int, label: str) -> str:
    """The label without the number that stands before it anyway."""
    return " ".join(word for word in label.split() if word != str(feature))


def hint(evidence: Evidence) -> str:
    """What a feature is about, in a few words: where it is active in its examples, and what it promotes."""
    strongest: dict[str, float] = {}
    for example in evidence.examples:
        for tokens in example.tokens.values():
            for token in tokens:
                text = token.text.strip()
                if token.activation > strongest.get(text, 0.0):
                    strongest[text] = token.activation
    words = sorted(strongest, key=lambda text: -strongest[text])[:3]
    where = f"active on {_words(words)}" if words else "active in none of its examples"
    return f"{where}; raises {_words(evidence.promotes[:3])}"


def _words(words: Sequence[str]) -> str:
    return " · ".join(shown(word.strip(), 20) or "␣" for word in words)


def _cell(name: str, value: float, scale: Scale) -> str:
    if name == "share":
        return percent(value)
    if name == "lift":
        return plain(value, 2)
    if name in ("chosen", "rejected"):
        return signed(scale(value))
    return signed(value, 2)
