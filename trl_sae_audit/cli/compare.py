"""`trl-sae-audit compare`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console import Justify, console, single_line, table
from ..errors import AuditError
from ..report.axes import Scale
from ..report.text import format_number, format_signed
from .options import OutputArguments
from .parser import option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..outcomes import Outcome
    from ..report.comparison import Difference, FeatureRow, Measure
    from ..report.sources import ReportSource

DESCRIPTION = (
    "Several runs or audits side by side: what their models do, where that was measured, and which features rise in generations, by the "
    "best score that all have: drift in generations, predicted effect size, selection, or attribution. With 95 % intervals; differences "
    "are from the first."
)
EXAMPLE = """\
trl-sae-audit compare runs/plain runs/filtered --output compare.html"""


@dataclass
class CompareArguments:
    """The comparison."""

    runs: list[str] = option("Directories of run records or audits.", positional=True, metavar="RUN")
    output: str | None = option(
        "Also write a page to look at to this file.", None, main=True, metavar="FILE.html"
    )
    names: list[str] | None = option("What to call them, one each.", None, metavar="NAME", text=True)
    top: int = option("Features to compare, the watched ones first.", 8)


OPTIONS = (CompareArguments, OutputArguments)
_FEATURE = "feature, words"
_COMPARED, _GAP, _WORDS_LEAST = 4, 2, 16
"""Columns beside the words that no table does without, what stands between columns, and the least that words get."""


def run(arguments: CompareArguments, output: OutputArguments) -> int:
    from ..report.comparison import compare_features, compare_outcomes
    from ..report.page import open_sources, write_report

    if len(arguments.runs) < 2:
        raise AuditError(
            "There is one run only; name at least two, or look at one with trl-sae-audit report."
        )
    sources = open_sources(arguments.runs, arguments.names)
    measures, rows = compare_outcomes(sources), compare_features(sources, arguments.top)
    page = None
    if arguments.output:
        title = "Compared: " + ", ".join(source.name for source in sources)
        page = write_report(arguments.runs, arguments.output, names=arguments.names, title=title)
    output.show(
        _document(sources, measures, rows, page), *_parts(sources, measures, rows, arguments.top, page)
    )
    return 0


def _parts(
    sources: Sequence[ReportSource],
    measures: Sequence[Measure],
    rows: Sequence[FeatureRow],
    top: int,
    page: Any,
) -> list[Any]:
    from ..report.sentences import describe_risen

    parts: list[Any] = []
    if measures:
        parts.append(_outcome_table(sources, measures))
    else:
        parts.append("No behaviour was measured: none of them has outcomes (trl_sae_audit.outcomes).")
    if rows:
        shown = max(top, sum(bool(row.label) for row in rows))
        parts.append(_feature_table(sources, rows[:shown]))
        parts.append(
            f"{rows[0].lead.meaning} ± and brackets: 95% intervals; a * marks a difference whose interval excludes 0."
        )
        risen = describe_risen(rows, sources, {row.feature: row.words for row in rows if row.words})
        rest = sum(row.rises for row in rows[shown:])
        parts += [risen] if risen else []
        parts += (
            [f"{rest} other features rise: --output and --json list all of them."] if risen and rest else []
        )
    else:
        parts.append("No two of them have the same dictionary, so features cannot be compared.")
    if page is not None:
        parts += ["The page, to open in a browser:", single_line(str(page))]
    return parts


def _outcome_table(sources: Sequence[ReportSource], measures: Sequence[Measure]) -> RenderableType:
    cells: list[list[str] | None] = []
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


def _feature_table(sources: Sequence[ReportSource], rows: Sequence[FeatureRow]) -> RenderableType:
    from ..report.sentences import name_feature

    lead = rows[0].lead
    values = [value for row in rows for value in row.values if value is not None]
    scale, loss_scale = (
        Scale.of(np.array(each))
        for each in zip(*((value.estimate, value.attribution) for value in values), strict=True)
    )
    names, blocks = [], []
    for row in rows:
        names.append(name_feature(row.feature, row.label) if row.label else str(row.feature))
        block = []
        for source, value, gap in zip(sources, row.values, row.differences, strict=True):
            if value is None:
                continue
            interval = f"± {format_number(scale(value.margin), 2)}"
            line = [
                source.name,
                format_signed(scale(value.estimate)),
                interval,
                _gap(gap, scale.factor, 2),
            ]
            if lead.name != "attribution":
                line.append(format_signed(loss_scale(value.attribution), 2))
            block.append(line)
        blocks.append(block)
    columns: dict[str, Justify] = {
        _FEATURE: "left",
        "run": "left",
        lead.heading: "right",
        "": "left",
        "from the first": "left",
    }
    what = (" of the mean loss" if sources[0].kind == "audit" else " per step") if lead.summed else ""
    title = f"What the losses pushed: attribution{what}{scale.unit}"
    if lead.name != "attribution":
        columns[f"attribution{loss_scale.unit}"] = "right"
        title = f"Which features rise: {lead.heading}{what}{scale.unit}"
    needed = sum(
        max(len(line[place]) for block in blocks for line in block) + _GAP for place in range(_COMPARED)
    )
    room = max(_WORDS_LEAST, console().width - needed)
    cells = [
        [about, *line]
        for name, row, block in zip(names, rows, blocks, strict=True)
        for about, line in zip(_about(name, row.words, len(block), room), block, strict=True)
    ]
    return table(title, columns, cells, words=_FEATURE, optional=list(columns)[5:])


def _about(name: str, words: str, lines: int, room: int) -> list[str]:
    """A feature's name and below it its words, in as many lines as it has runs."""
    if lines < 2:
        return [name][:lines]
    below = textwrap.wrap(words, room, max_lines=lines - 1, placeholder="…")
    return [name, *below, *[""] * (lines - 1 - len(below))]


def _gap(gap: Difference | None, scale: float, digits: int) -> str:
    if gap is None:
        return ""
    text = format_signed(gap.estimate * scale, digits)
    if math.isfinite(gap.low):
        text += f" [{format_signed(gap.low * scale, digits)}, {format_signed(gap.high * scale, digits)}]"
    return f"{text} *" if gap.clear else text


def _document(
    sources: Sequence[ReportSource], measures: Sequence[Measure], rows: Sequence[FeatureRow], page: Any
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
                "score": row.lead.name,
                "rises_more": row.rises_more,
                "values": {
                    name: None
                    if value is None
                    else {
                        "estimate": value.estimate,
                        "low": value.low,
                        "high": value.high,
                        "rises": value.rises,
                    }
                    for name, value in zip(names, row.values, strict=True)
                },
                "words": row.words,
                "attribution": {
                    name: None
                    if value is None
                    else {"estimate": value.attribution, "margin": value.attribution_margin}
                    for name, value in zip(names, row.values, strict=True)
                },
                "difference_from_first": dict(zip(names, row.differences, strict=True)),
            }
            for row in rows
        ],
        "page": page,
    }
