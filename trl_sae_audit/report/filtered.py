"""What a filter dropped, and why, read from the directory it wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from ..errors import AuditError
from ..filter_plan import rule_of
from ..untrusted import is_inside, read_json
from ..untrusted_tables import read_frame
from .axes import Scale
from .text import counted, plain, shown, signed

_MOST_ROWS = 30
_LONGEST = 400
_COLUMNS = {
    "attribution_before": "before",
    "attribution_after": "after",
    "attribution_control": "as many at random",
}


@dataclass(frozen=True)
class DroppedRow:
    """A row that left the data: its number, its score, why, and its texts by column."""

    row: int
    score: str
    reason: str
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class Filtered:
    """What a filter did.

    Attributes:
        sentence: counts and rule.
        unit: of the flags' attribution.
        columns, flags: their names; a name and its cells for each flag.
        rows: the highest scores first.
        total: how many were dropped.
    """

    sentence: str
    unit: str
    columns: list[str]
    flags: list[tuple[str, list[str]]]
    rows: list[DroppedRow]
    total: int


def read_filtered(directory: str | os.PathLike[str]) -> Filtered:
    """Read the output directory of `filter`.

    Raises:
        AuditError: it is none, or is damaged.
    """
    directory = Path(directory)
    try:
        record = read_json(directory / "filter.json")
        decisions = read_frame(directory / "decisions.parquet", columns=("row", "action", "score", "reason"))
        if not all(is_numeric_dtype(decisions[name].dtype) for name in ("row", "score")):
            raise ValueError("the rows or scores in decisions.parquet are not numbers")
        return _filtered(directory, record, decisions)
    except AuditError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        StopIteration,
        OverflowError,
    ) as error:
        raise AuditError(
            f"{directory} was not written by `filter`, or is damaged ({error}); pass the output_dir of trl-sae-audit filter."
        ) from error


def _filtered(directory: Path, record: Mapping[str, Any], decisions: pd.DataFrame) -> Filtered:
    summary, settings, files = record["summary"], record["settings"], record["files"]
    if not isinstance(files["dropped"], str) or not is_inside(directory, files["dropped"]):
        raise ValueError(f"it names the file {files['dropped']!r}, which does not lie in it")
    parts = [
        f"{counted(summary[name], 'row')} {name}"
        for name in ("dropped", "flipped", "weighted")
        if summary[name]
    ]
    sentence = (
        f"Of {counted(summary['rows'], 'row')}, {summary['kept']:,} were kept"
        + (f": {', '.join(parts)}" if parts else "")
        + f" (strategy {settings['strategy']}, by {_score(settings['score'])}, {rule_of(settings)})."
    )
    dropped = decisions[decisions["action"] == "drop"].sort_values("score", ascending=False).head(_MOST_ROWS)
    texts = _texts(directory / files["dropped"], set(dropped["row"]))
    rows = [
        DroppedRow(
            int(row["row"]),
            plain(row["score"]),
            shown(row["reason"], _LONGEST),
            texts.get(int(row["row"]), []),
        )
        for row in dropped.to_dict("records")
    ]
    columns = [name for name in _COLUMNS if summary["flags"] and name in summary["flags"][0]]
    scale = Scale.of(np.array([flag[name] for flag in summary["flags"] for name in columns], float))
    flags = [
        (
            shown(flag["label"] or f"feature {flag['feature']}", 80),
            [signed(scale(flag[name])) for name in columns],
        )
        for flag in summary["flags"]
    ]
    return Filtered(
        sentence, scale.unit, [_COLUMNS[name] for name in columns], flags, rows, int(summary["dropped"])
    )


def _score(score: Any) -> str:
    return score if isinstance(score, str) else json.dumps(score)


def _texts(path: Path, wanted: set[int]) -> dict[int, list[tuple[str, str]]]:
    from ..preferences import as_text, iterate_rows  # imports datasets

    found = {}
    for row in iterate_rows(path):
        columns = row.columns or {}
        number = columns.get("audit_row")
        if number in wanted:
            found[int(number)] = [
                (name, shown(as_text(columns[name]), _LONGEST))
                for name in ("prompt", "chosen", "rejected")
                if columns.get(name) is not None
            ]
    return found
