"""What a run taught, as a table for the terminal."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from .. import console as terminal
from ..io.feature_labels import caption
from ..record.leading import LEADINGS, known_leadings
from ..record.reader import RunRecord

PathLike = str | os.PathLike[str]
SIGNIFICANT = 0.05
_WORDS = "words"


def print_summary(
    directory: str | os.PathLike[str],
    n: int = 8,
    *,
    next_commands: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Show the features that gained and lost most over the run recorded in `directory`, and say where that is.

    Args:
        directory: the run record.
        n: features shown of either kind, per dictionary.
        next_commands: what to type next, shown at the end.
        console: where to print.
    """
    console = console or terminal.console()
    record = RunRecord.load(directory)
    explained: dict[str, str] = {}
    for dictionary in record.dictionaries:
        explained |= {
            each.score: each.meaning for each in known_leadings(record.features(dictionary["name"]))
        }
        console.print(feature_table(record, dictionary["name"], n), crop=False)
        if not _is_any_beyond_chance(record, dictionary["name"]):
            console.print("Nothing is beyond chance (q < 0.05): too few examples to tell.", highlight=False)
    if "generation_effect_size" in explained:
        last = record.table("generation_looks").iloc[-1]
        if not last["trusted"]:
            console.print(
                f"The {last['answers']} answers sampled at the start are worth {last['effective_sample_size']:.0f} of today's: the drift is "
                "too small, and has the right direction at best.",
                highlight=False,
            )
    scored = "selection" if "selection" in explained else "attribution"
    console.print(
        f"{' '.join(explained.values())} ±: the 95 % interval of the first score. q: of {scored}, corrected for the number of features. "
        "lift: how much more of the gradient lies along the "
        "feature than along a random direction.",
        style="dim",
        highlight=False,
    )
    console.print(f"run record: {record.directory} ({record.last_step} optimizer steps)", highlight=False)
    console.print(
        Text(f'read it:    RunRecord.load("{record.directory}").features()'), soft_wrap=True, highlight=False
    )
    for number, command in enumerate(next_commands):
        console.print(Text(f"{'' if number else 'next:':<12}{command}"), soft_wrap=True, highlight=False)


def report_command(record: PathLike) -> str:
    """The command that makes a page of a run's record."""
    return shlex.join(["trl-sae-audit", "report", str(record)])


def verify_command(record: PathLike) -> str:
    """The command that compares a run's scores with what its model does now; the record knows models, dictionary and data."""
    return shlex.join(["trl-sae-audit", "verify", str(record)])


def diff_command(record: PathLike) -> str:
    """The command that compares the model after a run with the one before, feature by feature."""
    return shlex.join(["trl-sae-audit", "diff", str(record)])


def _is_any_beyond_chance(record: RunRecord, dictionary: str) -> bool:
    features = record.features(dictionary)
    selects = "selection" in features and bool(features["selection"].notna().any())
    return bool((features["selection_q_value" if selects else "q_value"] < SIGNIFICANT).any())


def feature_table(record: RunRecord, dictionary: str, n: int = 8) -> RenderableType:
    """The features of one dictionary that moved most, either way, by the score that leads, with their words.

    `q` and the sides are selection's, where it is known. The columns behind the q-value are omitted where there is no room for them, and named.
    """
    features = record.features(dictionary)
    known = known_leadings(features)
    lead = known[0] if known else LEADINGS[-1]
    selects = any(each.score == "selection" for each in known)
    q_value = "selection_q_value" if selects else "q_value"
    sides = {f"selection_{side}" if selects else side: name for side, name in record.sides.items()}
    features = features.assign(margin=lead.half_width(features))
    gained = features[features[lead.score] > 0].nlargest(n, lead.order)
    lost = features[features[lead.score] < 0].nsmallest(n, lead.order)
    scores = [each.score for each in known[1:]]
    before, after = ([name for name in scores if name in some] for some in (("selection",), ("attribution",)))
    more = [*before, *sides.values(), *after, "lift"]
    columns: dict[str, terminal.Justify] = dict.fromkeys(("feature", lead.heading, "±", "q", *more), "right")
    if bool((features["words"] != "").any()) or bool(features["label"].any()):
        columns[_WORDS] = "left"
    lines: list[Sequence[str | Text] | None] = []
    for rows, style in ((gained, "green"), (lost, "red")):
        for _, row in rows.iterrows():
            cells: list[str | Text] = [
                str(row["feature"]),
                Text(f"{row[lead.score]:+.3g}", style),
                f"{row['margin']:.2g}",
                f"{row[q_value]:.2g}",
                *(f"{row[name]:+.3g}" for name in (*before, *sides, *after)),
                f"{row['lift']:.1f}",
            ]
            if _WORDS in columns:
                cells.append(Text(caption(row.to_dict())))
            lines.append(cells)
        lines.append(None)
    return terminal.table(
        f"What the run taught, in features of {dictionary}",
        columns,
        lines,
        words=_WORDS if _WORDS in columns else None,
        optional=more[::-1],
    )
