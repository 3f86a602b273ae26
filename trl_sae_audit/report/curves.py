"""The page's curves, drawn from the tables of the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ..metric_names import PENALTY, SHAPED_REWARD, parse_feature_metric
from ..statistics import NORMAL_QUANTILE
from ..text import sanitize_excerpt
from .charts import Drawing, Line, draw
from .comparison import FeatureRow, find_view
from .lead import known_leads, read_lead
from .sentences import name_feature
from .sources import ReportSource, View

_TRAINER_CHARTS = (
    "loss", "reward", "rewards/margins", "rewards/accuracies", "objective/scores", "objective/rlhf_reward", "kl",
    "objective/kl", "completions/mean_length",
)  # fmt: skip


@dataclass(frozen=True)
class _Score:
    """Columns of the table of steps: the score, its standard error, and its two sides."""

    name: str
    error: str
    sides: tuple[str, str]


_SELECTION = _Score("selection", "selection_standard_error", ("selection_positive", "selection_negative"))
_ATTRIBUTION = _Score("attribution", "standard_error", ("positive", "negative"))


def _score_of(tables: Sequence[pd.DataFrame]) -> _Score:
    """Selection, where every table has it; otherwise attribution."""
    known = all("selection" in steps and steps["selection"].notna().any() for steps in tables)
    return _SELECTION if known else _ATTRIBUTION


def draw_watched(source: ReportSource, view: View) -> list[Drawing]:
    """What each step selected of each watched feature, or asked of it, in total and by side."""
    steps = view.tables.get("steps")
    if steps is None:
        return []
    score, charts = _score_of([steps]), []
    for label, feature in view.watched.items():
        rows = steps[steps["feature"] == feature]
        step = rows["step"].to_numpy()
        margin = NORMAL_QUANTILE * rows[score.error].to_numpy()
        lines = [Line("total", step, rows[score.name].to_numpy(), margin)]
        if source.sides:
            lines += [
                Line(side, step, rows[column].to_numpy())
                for side, column in zip(source.sides, score.sides, strict=True)
            ]
        charts.append(
            draw(name_feature(feature, sanitize_excerpt(label, 80)), lines, f"{score.name} in a step")
        )
    return [chart for chart in charts if chart is not None]


def draw_generation_drift(view: View) -> Drawing | None:
    """How the watched features moved in what the model writes, over the looks."""
    known = view.over_time.get("generation_drift")
    if known is None or len(known.bins) < 2:
        return None
    lines = [
        Line(sanitize_excerpt(label, 40), known.bins[:, 1], known.values[:, feature])
        for label, feature in list(view.watched.items())[:6]
    ]
    return draw("In what the model writes, against the start", lines, "drift, in standard deviations")


def draw_compared(
    rows: Sequence[FeatureRow], sources: Sequence[ReportSource], most: int = 4
) -> list[Drawing]:
    """The first watched features of a comparison, in every run that recorded them."""
    main = sources[0].views[0]
    views = [find_view(source, main) for source in sources]
    known = [
        (place, source.name, view.tables["steps"])
        for place, (source, view) in enumerate(zip(sources, views, strict=True))
        if view and "steps" in view.tables
    ]
    score = _score_of([steps for *_, steps in known])
    charts = []
    for row in [row for row in rows if row.label][:most]:
        lines = []
        for place, name, steps in known:
            own = steps[steps["feature"] == row.feature]
            if len(own):
                step, values = own["step"].to_numpy(), own[score.name].to_numpy()
                lines.append(Line(name, step, values, style=f"run-{place % 6}"))
        if len(lines) > 1:
            title = name_feature(row.feature, sanitize_excerpt(row.label, 80))
            charts.append(draw(title, lines, f"{score.name} in a step"))
    return [chart for chart in charts if chart is not None]


def draw_largest(view: View, most: int = 4) -> list[Drawing]:
    """The features in front over the time bins of what leads. For runs that watch nothing."""
    lead = known_leads(view.features)[0]
    score = "generation_drift" if lead.name == "generation_effect_size" else lead.name
    known = view.over_time.get(score) or view.over_time.get("attribution")
    if known is None or len(known.bins) < 2:
        return []
    at = known.bins[:, 1] if known.level else known.bins.mean(axis=1)
    unit = "drift, in standard deviations" if known.level else f"mean {lead.heading} a step"
    largest = view.features.loc[read_lead(view.features, lead)["rank"].nlargest(most).index]
    charts = [
        draw(f"feature {feature}", [Line("total", at, known.values[:, feature])], unit)
        for feature in largest["feature"]
    ]
    return [chart for chart in charts if chart is not None]


def draw_drift(view: View) -> Drawing | None:
    """The drift of the watched features on the probe."""
    rows = view.tables.get("drift")
    if rows is None:
        return None
    lines = [
        Line(sanitize_excerpt(str(label), 40), part["step"].to_numpy(), part["drift"].to_numpy())
        for label, part in list(rows.groupby("label", sort=False))[:6]
    ]
    return draw("Drift: change of the mean activation on the probe texts", lines, "activation")


def draw_gradient(view: View) -> list[Drawing]:
    """Norm and coverage of the gradient, and fit of the dictionary."""
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
                "Coverage: share of the gradient in the span of the largest features",
                [
                    Line("largest features", step, gradient["coverage"].to_numpy()),
                    Line(
                        "the same number of random directions", step, gradient["coverage_random"].to_numpy()
                    ),
                ],
                "share of ‖G‖²",
            )
        )
    if health is not None:
        step = health["step"].to_numpy()
        charts.append(
            draw(
                "Fit: variance that the dictionary leaves unexplained",
                [
                    Line("typical token", step, health["token_fvu"].to_numpy()),
                    Line("all tokens", step, health["fvu"].to_numpy()),
                ],
                "share",
            )
        )
        charts.append(
            draw("Active features per token", [Line("L0", step, health["l0"].to_numpy())], "features")
        )
    return [chart for chart in charts if chart is not None]


def draw_shaping(source: ReportSource) -> list[Drawing]:
    """Reward and penalty, scores and coefficients, from the trainer's log. Empty for a run that was not shaped."""
    logged = _group_log(source)
    if PENALTY not in logged:
        return []
    pairs = [("reward before shaping", SHAPED_REWARD), ("penalty", PENALTY)]
    charts = [
        draw(
            "Reward and penalty",
            [_log_line(text, logged[name]) for text, name in pairs if name in logged],
            "reward",
        )
    ]
    for ending, title in (
        ("score", "Score of the flagged features"),
        ("coefficient", "Coefficient: penalty per unit of score"),
    ):
        lines = [
            _log_line(sanitize_excerpt(metric.label, 40), rows)
            for name, rows in logged.items()
            if (metric := parse_feature_metric(name)) and metric.score == ending
        ]
        charts.append(draw(title, lines[:6], ending))
    return [chart for chart in charts if chart is not None]


def draw_trainer_log(source: ReportSource) -> list[Drawing]:
    """The usual metrics that the trainer itself logged."""
    logged = _group_log(source)
    charts = [draw(name, [_log_line(name, logged[name])], "") for name in _TRAINER_CHARTS if name in logged]
    return [chart for chart in charts if chart is not None]


def _group_log(source: ReportSource) -> dict[str, pd.DataFrame]:
    if source.log is None or not len(source.log):
        return {}
    return {str(name): rows for name, rows in source.log.groupby("name", sort=False)}


def _log_line(name: str, rows: pd.DataFrame) -> Line:
    return Line(name, rows["step"].to_numpy(), rows["value"].to_numpy())
