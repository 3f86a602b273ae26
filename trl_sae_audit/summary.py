"""What a run taught, as a table for the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import terminal
from .record import RunRecord

Describe = Callable[[int], str]
"""Feature → what is known of it, shown beside it."""


def print_summary(
    directory: str | os.PathLike[str],
    n: int = 8,
    *,
    describe: Describe | None = None,
    console: Console | None = None,
) -> None:
    """Show the features that gained and lost most over the run recorded in `directory`, and say where that is.

    Args:
        directory: the run record.
        n: features shown of either kind, per dictionary.
        describe: what to show in a last column, such as a feature's strongest tokens.
        console: where to print.
    """
    console = console or terminal.console()
    record = RunRecord.load(directory)
    for dictionary in record.dictionaries:
        console.print(feature_table(record, dictionary["name"], n, describe=describe))
    console.print(
        "attribution: what the loss asked of the residual stream, summed over the run; + the gradient steps up-weight "
        "the feature, − they down-weight it. ± one standard error. lift: how much more of the gradient lies along the "
        "feature than along a random direction. It is no forecast of what the model will do: see the README.",
        style="dim",
        highlight=False,
    )
    console.print(f"run record: {record.directory} ({record.last_step} optimizer steps)", highlight=False)
    console.print(
        Text(f'read it:    RunRecord.load("{record.directory}").features()'), soft_wrap=True, highlight=False
    )


def feature_table(
    record: RunRecord, dictionary: str, n: int = 8, *, describe: Describe | None = None
) -> Table:
    """The features of one dictionary that gained and lost most over a run.

    The two sides of the loss are left out where `describe` needs the room.
    """
    features = record.features(dictionary)
    gained = features[features["attribution"] > 0].nlargest(n, "attribution")
    lost = features[features["attribution"] < 0].nsmallest(n, "attribution")
    sides = (record.manifest["sides"] or []) if describe is None else []
    named = describe is not None or bool(features["label"].fillna("").any())
    columns: dict[str, terminal.Justify] = dict.fromkeys(
        ("feature", "attribution", "±", "lift", "q", *sides), "right"
    )
    if named:
        columns["what it is"] = "left"
    table = terminal.table(f"What the run taught, in features of {dictionary}", columns, [])
    for rows, style in ((gained, "green"), (lost, "red")):
        for _, row in rows.iterrows():
            cells: list[str | Text] = [
                str(row["feature"]),
                Text(f"{row['attribution']:+.3g}", style),
                f"{row['standard_error']:.2g}",
                f"{row['lift']:.1f}",
                f"{row['q_value']:.2g}",
            ]
            cells += [f"{row[side]:+.3g}" for side in ("chosen", "rejected")[: len(sides)]]
            if named:
                cells.append(Text(_name(row, describe)))
            table.add_row(*cells)
        table.add_section()
    return table


def _name(row: pd.Series, describe: Describe | None) -> str:
    label = "" if pd.isna(row["label"]) or not row["label"] else f"[{row['label']}] "
    return label + (describe(int(row["feature"])) if describe else "")
