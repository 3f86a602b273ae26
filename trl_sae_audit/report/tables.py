"""The features that the loss pushed up and down most, as rows of text and positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..audit.evidence_files import Evidence
from ..text import sanitize_excerpt
from .axes import Scale, Whisker, find_reach
from .lead import SIGNIFICANT, Lead, known_leads, read_lead
from .sources import ReportSource, View
from .text import format_number, format_percent, format_probability, format_signed

_HEAD_ROWS = 10


@dataclass(frozen=True)
class Cell:
    """A number as text and as what a table is sorted by."""

    text: str
    value: float


@dataclass(frozen=True)
class HeadRow:
    """One of the features that gained or lost most."""

    feature: int
    label: str
    hint: str
    value: Cell
    margin: str
    whisker: Whisker
    cells: list[Cell]
    trend: Cell
    trend_is_clear: bool
    q: Cell
    is_clear: bool


@dataclass(frozen=True)
class HeadTable:
    """The features of one dictionary that gained most and lost most, by the score that leads.

    Attributes:
        tested: whether the leading score has q-values.
        scale: of the leading score.
        loss_scale: of attribution and its sides.
    """

    lead: Lead
    scale: Scale
    loss_scale: Scale
    columns: list[tuple[str, str]]
    tested: bool
    gained: list[HeadRow]
    lost: list[HeadRow]


def build_head_table(source: ReportSource, view: View) -> HeadTable:
    """Build the table of the features with the largest and the smallest leading score."""
    lead = known_leads(view.features)[0]
    score = read_lead(view.features, lead).add_prefix("lead_")
    frame = view.features.join(score).sort_values("lead_rank", ascending=False, kind="stable")
    frame = frame[frame["lead_rank"] >= 0]
    gained, lost = (frame[sign * frame["lead_value"] > 0].head(_HEAD_ROWS) for sign in (1, -1))
    both = pd.concat([gained, lost])
    reach = find_reach(both[["lead_value", "lead_low", "lead_high"]].to_numpy().ravel())
    scale, loss_scale = (Scale.of(both[name].to_numpy()) for name in ("lead_value", "attribution"))
    columns = [
        (name, text)
        for name, text in (
            ("selection", "selection"),
            ("disparity", "disparity"),
            ("predicted_change", "on given text"),
            ("attribution", f"attribution{loss_scale.unit}"),
        )
        if name in frame and name != lead.name
    ]
    if lead.name == "attribution":
        columns += [("share", "share"), ("lift", "lift")]
    if lead.name == "attribution" and source.sides and {"positive", "negative"} <= set(frame):
        columns += [("positive", source.sides[0]), ("negative", source.sides[1])]
    if "length_correlation" in frame:
        columns += [("length_correlation", "length corr.")]

    def row(values: dict[Any, Any]) -> HeadRow:
        feature = int(values["feature"])
        evidence = source.evidence.get((view.name, feature))
        trend = values.get("trend_tau", math.nan)
        return HeadRow(
            feature,
            strip_number(
                feature, sanitize_excerpt(values["label"] or (evidence.label if evidence else ""), 80)
            ),
            describe_feature(str(values["words"]), evidence),
            Cell(format_signed(scale(values["lead_value"]), padded=True), values["lead_value"]),
            format_number(scale((values["lead_high"] - values["lead_low"]) / 2), 2, padded=True),
            Whisker.on((-reach, reach), values["lead_value"], (values["lead_high"] - values["lead_low"]) / 2),
            [Cell(_format(name, values[name], loss_scale), values[name]) for name, _ in columns],
            Cell("–" if not math.isfinite(trend) else f"{_arrow(trend)} {format_signed(trend, 2)}", trend),
            bool(values.get("trend_q_value", 1.0) < SIGNIFICANT),
            Cell(format_probability(values["lead_q"]), values["lead_q"]),
            bool(values["lead_clear"]),
        )

    return HeadTable(
        lead,
        scale,
        loss_scale,
        columns,
        bool(both["lead_q"].notna().any()),
        [row(values) for values in gained.to_dict("records")],
        [row(values) for values in lost.to_dict("records")],
    )


def _arrow(trend: float) -> str:
    return "→" if trend == 0 else "↗" if trend > 0 else "↘"


def strip_number(feature: int, label: str) -> str:
    """The label without the feature's number, which is shown before it anyway."""
    return " ".join(word for word in label.split() if word != str(feature))


def describe_feature(words: str, evidence: Evidence | None) -> str:
    """Describe a feature in a few words: where it is most active and, if evidence was gathered, what it promotes."""
    words = words or (evidence.words if evidence else "")
    parts = [sanitize_excerpt(words, 120)] if words else []
    if evidence and evidence.promotes:
        parts.append(f"raises {_join_words(evidence.promotes[:3])}")
    return "; ".join(parts)


def _join_words(words: Sequence[str]) -> str:
    return " · ".join(sanitize_excerpt(word.strip(), 20) or "␣" for word in words)


def _format(name: str, value: float, scale: Scale) -> str:
    if name == "share":
        return format_percent(value)
    if name == "lift":
        return format_number(value, 2)
    if name in ("attribution", "positive", "negative"):
        return format_signed(scale(value))
    return format_signed(value, 2)
