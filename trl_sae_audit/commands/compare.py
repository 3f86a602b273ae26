"""`trl-sae-audit compare`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from ..errors import AuditError
from ..outcomes import Outcome
from ..report.axes import Scale
from ..report.comparison import Difference, FeatureRow, Measure, compare_features, compare_outcomes
from ..report.page import open_sources, write_report
from ..report.sentences import named
from ..report.sources import Source
from ..report.text import plain, signed
from ..terminal import OutputArguments, table, to_copy
from .arguments import parse
from .preferences import leading_as_option

DESCRIPTION = (
    "Several runs or audits side by side: what their models do, where that was measured, and what their losses asked "
    "for, with 95 % intervals; differences are from the first. Example: trl-sae-audit compare runs/plain runs/filtered runs/shaped "
    "--output compare.html"
)


@dataclass
class CompareArguments:
    """The comparison."""

    runs: list[str] = field(
        metadata={"help": "Directories of run records or audits; may stand first, without --runs."}
    )
    names: list[str] | None = field(default=None, metadata={"help": "What to call them, one each."})
    top: int = field(default=8, metadata={"help": "Features to compare, the watched ones first."})
    output: str | None = field(default=None, metadata={"help": "Also write a page to look at to this file."})


def main(argv: Sequence[str]) -> int:
    arguments, output = parse(
        "compare", DESCRIPTION, (CompareArguments, OutputArguments), leading_as_option(argv, "runs")
    )
    if len(arguments.runs) < 2:
        raise AuditError(
            "There is one run only; name at least two, or look at one with trl-sae-audit report."
        )
    sources = open_sources(arguments.runs, arguments.names)
    measures, rows = compare_outcomes(sources), compare_features(sources, arguments.top)[: arguments.top]
    page = None
    if arguments.output:
        title = "Compared: " + ", ".join(source.name for source in sources)
        page = write_report(arguments.runs, arguments.output, names=arguments.names, title=title)
    output.show(_document(sources, measures, rows, page), *_parts(sources, measures, rows, page))
    return 0


def _parts(
    sources: Sequence[Source], measures: Sequence[Measure], rows: Sequence[FeatureRow], page: Any
) -> list[Any]:
    parts: list[Any] = []
    if measures:
        parts.append(_outcome_table(sources, measures))
    else:
        parts.append("No behaviour was measured: none of them has outcomes (trl_sae_audit.outcomes).")
    if rows:
        parts.append(_feature_table(sources, rows))
        parts.append("In brackets 95% intervals; a * marks a difference whose interval excludes 0.")
    else:
        parts.append("No two of them have the same dictionary, so features cannot be compared.")
    if page is not None:
        parts += ["The page, to open in a browser:", to_copy(str(page))]
    return parts


def _outcome_table(sources: Sequence[Source], measures: Sequence[Measure]) -> Table:
    cells = []
    for measure in measures:
        runs: list[tuple[str, Outcome | None, Difference | None]] = [
            ("before", measure.before, None),
            *zip((source.name for source in sources), measure.after, measure.differences, strict=True),
        ]
        first = True
        for name, outcome, gap in runs:
            if outcome is None:
                continue
            scale, digits = (100, 2) if outcome.unit == "share" else (1, 3)
            interval = (
                "" if outcome.low is None else f"[{outcome.text(outcome.low)}, {outcome.text(outcome.high)}]"
            )
            cells.append(
                [measure.name if first else "", name, outcome.text(), interval, _gap(gap, scale, digits)]
            )
            first = False
    columns = {"measure": "left", "run": "left", "value": "right", "": "left", "from the first": "left"}
    return table("What the models do", columns, cells)  # type: ignore[arg-type]


def _feature_table(sources: Sequence[Source], rows: Sequence[FeatureRow]) -> Table:
    scale = Scale.of(np.array([value[0] for row in rows for value in row.values if value is not None]))
    cells = []
    for row in rows:
        first = True
        for source, value, gap in zip(sources, row.values, row.differences, strict=True):
            if value is None:
                continue
            name = (named(row.feature, row.label) if row.label else str(row.feature)) if first else ""
            interval = f"± {plain(scale(value[1]), 2)}"
            cells.append([name, source.name, signed(scale(value[0])), interval, _gap(gap, scale.factor, 2)])
            first = False
    columns = {"feature": "left", "run": "left", "attribution": "right", "": "left", "from the first": "left"}
    what = "of the mean loss" if sources[0].kind == "audit" else "per step"
    return table(f"What the losses asked for, attribution {what}{scale.unit}", columns, cells)  # type: ignore[arg-type]


def _gap(gap: Difference | None, scale: float, digits: int) -> str:
    if gap is None:
        return ""
    text = signed(gap.estimate * scale, digits)
    if math.isfinite(gap.low):
        text += f" [{signed(gap.low * scale, digits)}, {signed(gap.high * scale, digits)}]"
    return f"{text} *" if gap.clear else text


def _document(
    sources: Sequence[Source], measures: Sequence[Measure], rows: Sequence[FeatureRow], page: Any
) -> dict[str, Any]:
    names = [source.name for source in sources]
    return {
        "runs": [
            {
                "name": source.name,
                "directory": source.directory,
                "kind": source.kind,
                "status": source.status,
                "steps" if source.kind == "run" else "examples": source.amount,
                "dictionaries": [dict(view.described) for view in source.views],
            }
            for source in sources
        ],
        "outcomes": [
            {
                "measure": measure.name,
                "wanted": measure.wanted,
                "before": measure.before,
                "after": dict(zip(names, measure.after, strict=True)),
                "difference_from_first": dict(zip(names, measure.differences, strict=True)),
            }
            for measure in measures
        ],
        "features": [
            {
                "feature": row.feature,
                "label": row.label,
                "attribution": {
                    name: None if value is None else {"estimate": value[0], "margin": value[1]}
                    for name, value in zip(names, row.values, strict=True)
                },
                "difference_from_first": dict(zip(names, row.differences, strict=True)),
            }
            for row in rows
        ],
        "page": page,
    }
