"""Runs side by side as dots and whiskers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..text import sanitize_excerpt
from .axes import Scale, Whisker, find_reach
from .comparison import FeatureRow, Measure
from .sentences import name_feature
from .sources import ReportSource
from .text import format_number, format_signed


@dataclass(frozen=True)
class Dot:
    """One run's value in a plot of dots and whiskers."""

    source: int
    name: str
    whisker: Whisker
    text: str
    interval: str
    note: str


@dataclass(frozen=True)
class DotRow:
    """A measure or a feature, with a dot for each run."""

    name: str
    feature: int | None
    note: str
    dots: list[Dot]


@dataclass(frozen=True)
class DotPlot:
    """Rows on one common axis, or each on its own."""

    rows: list[DotRow]
    unit: str
    ends: tuple[str, str] | None


def plot_outcomes(measures: Sequence[Measure], sources: Sequence[ReportSource]) -> DotPlot:
    """Plot the measures, with a dot per run. Shares have an axis from 0 to 100 %, other numbers their own."""
    rows = []
    for measure in measures:
        axis = (0.0, 1.0) if measure.unit == "share" else _axis(measure)
        dots = []
        if measure.before:
            dots.append(_outcome_dot(-1, "before training", axis, measure.before, ""))
        for place, (source, outcome) in enumerate(zip(sources, measure.after, strict=True)):
            if outcome:
                gap = measure.differences[place] if place else measure.change
                against = sources[0].name if place else "before"
                dots.append(_outcome_dot(place, source.name, axis, outcome, _gap(gap, outcome.unit, against)))
        counts = {outcome.n for outcome in measure.all}
        notes = [{"up": "more is better", "down": "less is better", "": ""}[measure.wanted]]
        if len(counts) == 1 and None not in counts:
            notes.append(f"n = {counts.pop():,} each")
            dots = [replace(dot, interval=dot.interval.split(", n = ")[0]) for dot in dots]
        note = "; ".join(part for part in notes if part)
        rows.append(DotRow(measure.name, None, note, dots))
    return DotPlot(rows, "", None)


def _axis(measure: Measure) -> tuple[float, float]:
    ends = [
        value for each in measure.all for value in (each.low, each.estimate, each.high) if value is not None
    ]
    low, high = min(0.0, *ends), max(0.0, *ends)
    return (low, high) if high > low else (low, low + 1.0)


def _outcome_dot(source: int, name: str, axis: tuple[float, float], outcome: Any, note: str) -> Dot:
    low = outcome.estimate if outcome.low is None else outcome.low
    high = outcome.estimate if outcome.high is None else outcome.high
    interval = "" if outcome.low is None else f"{outcome.text(low)} to {outcome.text(high)}"
    if outcome.n is not None:
        interval += f"{', ' if interval else ''}n = {outcome.n:,}"
    return Dot(
        source, name, Whisker.between(axis, low, outcome.estimate, high), outcome.text(), interval, note
    )


def _gap(gap: Any, unit: str, against: str) -> str:
    if gap is None:
        return ""
    factor, ending = (100, " points") if unit == "share" else (1, "")
    digits = 2 if unit == "share" else 3
    text = f"{format_signed(gap.estimate * factor, digits)}{ending} from {against}"
    if not math.isfinite(gap.low):
        return text
    text += f" ({format_signed(gap.low * factor, digits)} to {format_signed(gap.high * factor, digits)})"
    return text if gap.clear else f"{text}, not clear"


def plot_features(
    rows: Sequence[FeatureRow], sources: Sequence[ReportSource], hints: dict[int, str]
) -> DotPlot | None:
    """Plot features side by side: the leading score on one axis. None if there is nothing to compare."""
    if not rows:
        return None
    values = [value for row in rows for value in row.values if value is not None]
    scale = Scale.of(np.array([value.estimate for value in values]))
    ends = [end for value in values for end in (value.estimate, value.low, value.high)]
    reach = find_reach(ends)
    plotted = []
    for row in rows:
        dots = []
        for place, (source, value) in enumerate(zip(sources, row.values, strict=True)):
            if value is None:
                continue
            gap = row.differences[place]
            note = "" if gap is None else "differs" if gap.clear else "no clear difference"
            if row.lead.name != "attribution" and value.rises:
                note = f"rises{'; ' if note else ''}{note}"
            dots.append(
                Dot(
                    place,
                    source.name,
                    Whisker.on((-reach, reach), value.estimate, value.margin),
                    format_signed(scale(value.estimate)),
                    f"± {format_number(scale(value.margin), 2)}",
                    note,
                )
            )
        plotted.append(
            DotRow(
                name_feature(row.feature, sanitize_excerpt(row.label, 80)),
                row.feature,
                hints.get(row.feature, ""),
                dots,
            )
        )
    return DotPlot(plotted, scale.unit, (format_signed(scale(-reach), 2), format_signed(scale(reach), 2)))
