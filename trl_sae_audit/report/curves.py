"""The page's curves: from tables of the record to drawings."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .charts import Drawing, Line, draw
from .comparison import FeatureRow, view_like
from .sentences import named
from .sources import Source, View
from .text import shown

_TRAINER_CHARTS = (
    "loss", "reward", "rewards/margins", "rewards/accuracies", "objective/scores", "objective/rlhf_reward", "kl",
    "objective/kl", "completions/mean_length",
)  # fmt: skip


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
