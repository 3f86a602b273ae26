"""What to type after an audit: commands with a feature of its table in them."""

from __future__ import annotations

import shlex
from collections.abc import Container, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..console import single_line

Row = Mapping[Hashable, Any]


def next_commands(directory: Path, rows: Sequence[Row], score: str, certain: Container[int]) -> list[Any]:
    """The audit's report, and a flag.

    Args:
        directory: of the audit.
        rows: of the table, the first in front.
        score: the column that the table is ordered by.
        certain: features beyond chance.
    """
    row = _example(rows, score, certain)
    return [
        *report_command(directory),
        single_line(f"  trl-sae-audit flag {shlex.quote(str(directory))} {_flag_options(row, score)}"),
    ]


def report_command(directory: Path) -> list[Any]:
    """Where the audit is, and the command that makes a page of it."""
    return [
        single_line(f"Audit in {directory}; next:"),
        single_line(f"  trl-sae-audit report {shlex.quote(str(directory))}"),
    ]


def _example(rows: Sequence[Row], score: str, certain: Container[int]) -> Row:
    """The first that is beyond chance and rises; one that falls, or that may be chance, only where there is no such."""
    return max(rows, key=lambda row: (int(row["feature"]) in certain, row[score] > 0))


def _flag_options(row: Row, score: str) -> str:
    options = [f"--family {row['family']}" if row["family"] else f"--feature {row['feature']}"]
    if not row["label"]:  # `flag` takes the label that the audit has
        phrase = str(row["words"]).split("; raises")[0].split(" · ")[0].strip()
        options.append(f"--label {shlex.quote(phrase or '…')}")
    if row[score] < 0:
        options.append("--direction down")
    return " ".join(options)
