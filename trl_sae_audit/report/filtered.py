"""Which rows a filter dropped, and why, read from the directory it wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from ..filtering.check import describe_check
from ..filtering.plan import describe_rule
from ..io.manifest import MANIFEST, read_manifest, reading, stored_files
from ..io.tables import read_frame
from ..text import sanitize_excerpt
from .axes import Scale
from .text import format_count, format_number, format_signed

_MOST_ROWS = 30
_LONGEST = 400
_WHEN = {"before": "before", "after": "after", "control": "random rows dropped"}


@dataclass(frozen=True)
class DroppedRow:
    """A dropped row: its number, score, reason, and texts by column."""

    row: int
    score: str
    reason: str
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class FilterSummary:
    """What a filter did.

    Attributes:
        sentences: counts and rule, and what a step on the kept rows is predicted to do.
        columns, flags: names of the columns; a name and its cells for each flag.
        rows: highest scores first.
        total: how many were dropped.
    """

    sentences: list[str]
    columns: list[str]
    flags: list[tuple[str, list[str]]]
    rows: list[DroppedRow]
    total: int


def read_filtered(directory: str | os.PathLike[str]) -> FilterSummary:
    """Read the output directory of `filter`.

    Raises:
        AuditError: it is not one, or it is damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, "filtered")
    for stored in stored_files(manifest):
        if stored.file.startswith(("decisions", "dropped")):
            stored.check_on_disk(directory)
    with reading(directory / MANIFEST):
        decisions = read_frame(directory / "decisions.parquet", columns=("row", "action", "score", "reason"))
        if not all(is_numeric_dtype(decisions[name].dtype) for name in ("row", "score")):
            raise ValueError("the rows or scores in decisions.parquet are not numbers")
        return _summarize(directory, manifest, decisions)


def _summarize(directory: Path, manifest: Mapping[str, Any], decisions: pd.DataFrame) -> FilterSummary:
    summary, config = manifest["summary"], manifest["config"]
    parts = [
        f"{format_count(summary[name], 'row')} {name}"
        for name in ("dropped", "flipped", "weighted", "repeated")
        if summary[name]
    ]
    sentence = (
        f"Of {format_count(summary['rows'], 'row')}, {summary['kept']:,} were kept"
        + (f": {', '.join(parts)}" if parts else "")
        + f" (strategy {config['strategy']}, by {config['score']}, {describe_rule(config)})."
    )
    dropped = decisions[decisions["action"] == "drop"].sort_values("score", ascending=False).head(_MOST_ROWS)
    file = next(stored.file for stored in stored_files(manifest) if stored.file.startswith("dropped"))
    texts = _read_texts(directory / file.partition("/")[0], set(dropped["row"]))
    rows = [
        DroppedRow(
            int(row["row"]),
            format_number(row["score"]),
            sanitize_excerpt(row["reason"], _LONGEST),
            texts.get(int(row["row"]), []),
        )
        for row in dropped.to_dict("records")
    ]
    columns, flags = _flag_table(summary)
    checked = describe_check(summary["check"]) if "check" in summary else []
    return FilterSummary([sentence, *checked], columns, flags, rows, int(summary["dropped"]))


def _flag_table(summary: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Of each flag the predicted effect, where it was predicted again, then disparity, then attribution; before and after."""
    flags = summary["flags"]
    predicted = summary["check"]["flags"] if "check" in summary else [{}] * len(flags)
    columns: list[str] = []
    cells: list[list[str]] = [[] for _ in flags]
    for title, prefix, entries in (
        ("effect size", "", predicted),
        ("disparity", "disparity_", flags),
        ("attribution", "attribution_", flags),
    ):
        names = [f"{prefix}{when}" for when in _WHEN if entries and f"{prefix}{when}" in entries[0]]
        scale = Scale.of(np.array([entry[name] for entry in entries for name in names], float))
        for name in names:
            columns.append(f"{title} {_WHEN[name.removeprefix(prefix)]}{scale.unit}")
            for row, entry in zip(cells, entries, strict=True):
                row.append(format_signed(scale(entry[name])))
                if f"{name}_low" in entry:
                    row[-1] += (
                        f" ± {format_number(scale(entry[f'{name}_high'] - entry[f'{name}_low']) / 2, 2)}"
                    )
                elif f"{name}_margin" in entry:
                    row[-1] += f" ± {format_number(scale(entry[f'{name}_margin']), 2)}"
    names = [sanitize_excerpt(flag["label"] or f"feature {flag['feature']}", 80) for flag in flags]
    return columns, list(zip(names, cells, strict=True))


def _read_texts(path: Path, wanted: set[int]) -> dict[int, list[tuple[str, str]]]:
    from ..data.preferences import as_text, iterate_rows  # imports datasets

    texts = {}
    for row in iterate_rows(path):
        columns = row.columns or {}
        number = columns.get("audit_row")
        if number in wanted:
            texts[int(number)] = [
                (name, sanitize_excerpt(as_text(columns[name]), _LONGEST))
                for name in ("prompt", "chosen", "rejected")
                if columns.get(name) is not None
            ]
    return texts
