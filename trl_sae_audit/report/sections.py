"""The parts of the page: numbers from the sources, as the words and positions the template puts in their places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ..evidence_files import Evidence
from .charts import Drawing, Line, draw
from .comparison import FeatureRow, Measure, view_like
from .curriculum import Map
from .sentences import SIGNIFICANT, named
from .sources import Source, View
from .text import percent, plain, probability, shown, signed

_HEAD_ROWS = 10
_TRAINER_CHARTS = (
    "loss", "reward", "rewards/margins", "rewards/accuracies", "objective/scores", "objective/rlhf_reward", "kl",
    "objective/kl", "completions/mean_length",
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """A power of ten that makes a column readable: values are shown times `factor`, and `unit` says so."""

    factor: float
    unit: str

    @classmethod
    def of(cls, values: np.ndarray) -> Scale:
        finite = np.abs(values[np.isfinite(values)])
        largest = float(finite.max()) if finite.size else 0.0
        if largest == 0 or 0.1 <= largest < 1000:
            return cls(1.0, "")
        power = math.floor(math.log10(largest))
        return cls(10.0**-power, f" ×10{_superscript(power)}")

    def __call__(self, value: float) -> float:
        return value * self.factor


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@dataclass(frozen=True)
class Whisker:
    """A value and its interval, in percent of an axis' width."""

    low: float
    middle: float
    high: float
    zero: float

    @classmethod
    def on(cls, axis: tuple[float, float], value: float, margin: float) -> Whisker:
        margin = margin if math.isfinite(margin) else 0.0
        return cls.between(axis, value - margin, value, value + margin)

    @classmethod
    def between(cls, axis: tuple[float, float], low: float, value: float, high: float) -> Whisker:
        start, end = axis

        def place(x: float) -> float:
            return round(100 * min(1.0, max(0.0, (x - start) / (end - start))), 2)

        return cls(place(low), place(value), place(high), place(0.0))


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


# Curves


def watched_charts(source: Source, view: View) -> list[Drawing]:
    """Each watched feature's attribution over the steps, in all and by side."""
    steps = view.tables.get("steps")
    if steps is None:
        return []
    charts = []
    for label, feature in view.watched.items():
        rows = steps[steps["feature"] == feature]
        step = rows["step"].to_numpy()
        lines = [
            Line("in all", step, rows["attribution"].to_numpy(), 1.96 * rows["standard_error"].to_numpy())
        ]
        if source.sides:
            lines += [
                Line(side, step, rows[column].to_numpy())
                for side, column in zip(source.sides, ("chosen", "rejected"), strict=True)
            ]
        charts.append(draw(named(feature, shown(label, 80)), lines, "attribution in a step"))
    return [chart for chart in charts if chart is not None]


def compared_charts(rows: Sequence[FeatureRow], sources: Sequence[Source], most: int = 4) -> list[Drawing]:
    """The first watched features of a comparison, in every run that recorded them."""
    main = sources[0].views[0]
    views = [view_like(source, main) for source in sources]
    charts = []
    for row in [row for row in rows if row.label][:most]:
        lines = []
        for place, (source, view) in enumerate(zip(sources, views, strict=True)):
            steps = view.tables.get("steps") if view else None
            own = None if steps is None else steps[steps["feature"] == row.feature]
            if own is not None and len(own):
                lines.append(
                    Line(
                        source.name,
                        own["step"].to_numpy(),
                        own["attribution"].to_numpy(),
                        style=f"run-{place % 6}",
                    )
                )
        if len(lines) > 1:
            charts.append(draw(named(row.feature, shown(row.label, 80)), lines, "attribution in a step"))
    return [chart for chart in charts if chart is not None]


def largest_charts(view: View, most: int = 4) -> list[Drawing]:
    """Where nothing is watched: the largest features, from the map's time bins."""
    if view.means is None or view.bins is None or len(view.bins) < 2:
        return []
    middle = view.bins.mean(axis=1)
    largest = view.features.reindex(view.features["attribution"].abs().nlargest(most).index)
    charts = [
        draw(
            f"feature {feature}", [Line("in all", middle, view.means[:, feature])], "mean attribution a step"
        )
        for feature in largest["feature"]
    ]
    return [chart for chart in charts if chart is not None]


def drift_chart(view: View) -> Drawing | None:
    """What happened to the watched features on the probe."""
    rows = view.tables.get("drift")
    if rows is None:
        return None
    lines = [
        Line(shown(str(label), 40), part["step"].to_numpy(), part["drift"].to_numpy())
        for label, part in list(rows.groupby("label", sort=False))[:6]
    ]
    return draw("Drift: change of the mean activation on the probe texts", lines, "activation")


def gradient_charts(view: View) -> list[Drawing]:
    """Norm and coverage of the gradient, fit of the dictionary."""
    charts: list[Drawing | None] = []
    gradient, health = view.tables.get("gradient"), view.tables.get("health")
    if gradient is not None:
        gradient = gradient[gradient["finite"].astype(bool)]
        step = gradient["step"].to_numpy()
        charts.append(
            draw("Gradient norm at the layer", [Line("norm", step, gradient["norm"].to_numpy())], "‖G‖")
        )
        charts.append(
            draw(
                "Coverage: what the largest features hold of the gradient",
                [
                    Line("largest features", step, gradient["coverage"].to_numpy()),
                    Line("as many random directions", step, gradient["coverage_random"].to_numpy()),
                ],
                "share of ‖G‖²",
            )
        )
    if health is not None:
        step = health["step"].to_numpy()
        charts.append(
            draw(
                "Fit: variance the dictionary leaves unexplained",
                [
                    Line("of a usual token", step, health["token_fvu"].to_numpy()),
                    Line("of all variance", step, health["fvu"].to_numpy()),
                ],
                "share",
            )
        )
        charts.append(
            draw("Active features a token", [Line("L0", step, health["l0"].to_numpy())], "features")
        )
    return [chart for chart in charts if chart is not None]


def shaping_charts(source: Source) -> list[Drawing]:
    """Reward and penalty, scores and coefficients, from the trainer's log; empty for a run that was not shaped."""
    logged = _logged(source)
    if "shaping/penalty" not in logged:
        return []
    pairs = [("inner reward", "shaping/reward"), ("penalty taken off", "shaping/penalty")]
    charts = [
        draw(
            "Reward and penalty",
            [_log_line(text, logged[name]) for text, name in pairs if name in logged],
            "reward",
        )
    ]
    for ending, title in (
        ("score", "Score of the flagged features"),
        ("coefficient", "Coefficient: what a unit of score costs"),
    ):
        lines = [
            _log_line(shown(name.split("/", 1)[1].rsplit("/", 1)[0], 40), rows)
            for name, rows in logged.items()
            if name.startswith("shaping/") and name.endswith(f"/{ending}")
        ]
        charts.append(draw(title, lines[:6], ending))
    return [chart for chart in charts if chart is not None]


def trainer_charts(source: Source) -> list[Drawing]:
    """What the trainer itself logged, of the usual names."""
    logged = _logged(source)
    charts = [draw(name, [_log_line(name, logged[name])], "") for name in _TRAINER_CHARTS if name in logged]
    return [chart for chart in charts if chart is not None]


def _logged(source: Source) -> dict[str, pd.DataFrame]:
    if source.log is None or not len(source.log):
        return {}
    return {str(name): rows for name, rows in source.log.groupby("name", sort=False)}


def _log_line(name: str, rows: pd.DataFrame) -> Line:
    return Line(name, rows["step"].to_numpy(), rows["value"].to_numpy())


# Side by side


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
    """A measure or a feature, a dot for each run."""

    name: str
    feature: int | None
    note: str
    dots: list[Dot]


@dataclass(frozen=True)
class DotPlot:
    """Rows on one axis, or each on its own."""

    rows: list[DotRow]
    unit: str
    ends: tuple[str, str] | None


def outcome_plot(measures: Sequence[Measure], sources: Sequence[Source]) -> DotPlot:
    """The measures, each run a dot. Shares stand on an axis from 0 to 100 %, other numbers on one of their own."""
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
    ends = [value for one in measure.all for value in (one.low, one.estimate, one.high) if value is not None]
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
    text = f"{signed(gap.estimate * factor, digits)}{ending} from {against}"
    if not math.isfinite(gap.low):
        return text
    text += f" ({signed(gap.low * factor, digits)} to {signed(gap.high * factor, digits)})"
    return text if gap.clear else f"{text}, not clear"


def feature_plot(
    rows: Sequence[FeatureRow], sources: Sequence[Source], hints: dict[int, str]
) -> DotPlot | None:
    """Features side by side, attribution per step on one axis; None if there is nothing to compare."""
    if not rows:
        return None
    values = [value for row in rows for value in row.values if value is not None]
    scale = Scale.of(np.array([value for value, _ in values]))
    reach = max(abs(value) + (margin if math.isfinite(margin) else 0) for value, margin in values) or 1.0
    plotted = []
    for row in rows:
        dots = []
        for place, (source, value) in enumerate(zip(sources, row.values, strict=True)):
            if value is None:
                continue
            gap = row.differences[place]
            note = "" if gap is None else "differs" if gap.clear else "no clear difference"
            dots.append(
                Dot(
                    place,
                    source.name,
                    Whisker.on((-reach, reach), *value),
                    signed(scale(value[0])),
                    f"± {plain(scale(value[1]), 2)}",
                    note,
                )
            )
        plotted.append(
            DotRow(named(row.feature, shown(row.label, 80)), row.feature, hints.get(row.feature, ""), dots)
        )
    return DotPlot(plotted, scale.unit, (signed(scale(-reach), 2), signed(scale(reach), 2)))


def map_note(found: Map, view: View) -> str:
    """What the map shows, for whoever cannot see it."""
    first, last = int(found.bins[0][0]), int(found.bins[-1][1])
    return (
        f"{len(found.features)} of {view.described['d_sae']:,} features over steps {first} to {last}, in "
        f"{len(found.groups)} groups; the table below says what each group did."
    )
