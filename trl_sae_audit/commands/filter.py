"""`trl-sae-audit filter`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict

from ..audit_result import Audit
from ..errors import AuditError
from ..filter_plan import BALANCE
from ..filtering import FilterResult, filter_preferences
from ..flags import FlagSet
from ..terminal import Justify, OutputArguments, table, to_copy
from ..untrusted import parse_json
from .arguments import parse
from .preferences import PreferenceArguments

DESCRIPTION = (
    "Remove, flip or weight down the pairs that teach flagged features, and write what stays, what leaves and why. "
    "Example: trl-sae-audit filter --dataset pairs.jsonl --audit runs/audit --flags flags.yaml --budget 0.05 "
    "--output_dir data/filtered"
)


@dataclass
class FilterArguments:
    """The filter."""

    audit: str = field(metadata={"help": "Directory of the audit of this dataset."})
    output_dir: str = field(
        metadata={"help": "Made; holds the kept and the dropped rows and a dataset card."}
    )
    flags: str = field(default="flags.yaml", metadata={"help": "The flagged features."})
    strategy: Literal["drop", "flip", "weight", "resample"] = field(
        default="drop",
        metadata={
            "help": "drop them; flip chosen and rejected; add a column with a weight; keep each with that probability."
        },
    )
    score: str = field(
        default="attribution",
        metadata={
            "help": "attribution, activation_attribution, influence, activation, max_activation, or a mix: "
            '\'{"attribution": 1, "activation": 1}\'.'
        },
    )
    weights: Literal["flags", "fit"] = field(
        default="flags",
        metadata={"help": "Add flags up by their own weights, or by what explains the preferences best."},
    )
    budget: str | None = field(
        default=None,
        metadata={
            "help": "At most this many rows, or below 1 this share of them; or balance: as few as it takes for the rest not "
            "to teach what was flagged."
        },
    )
    threshold: float | None = field(default=None, metadata={"help": "Rows with a score above this."})
    quantile: float | None = field(
        default=None, metadata={"help": "Rows with a score above this quantile of the scores."}
    )
    control: bool = field(default=False, metadata={"help": "Also write a control: as many rows at random."})
    weight_column: str = field(default="weight", metadata={"help": "Column for strategy weight."})
    on_bad_row: Literal["stop", "set_aside"] = field(
        default="stop",
        metadata={"help": "What to do at a row that is no pair; set aside, it goes to the dropped."},
    )
    format: str | None = field(
        default=None, metadata={"help": "jsonl, parquet or dataset; default the input's own."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run wrote."})
    seed: int = field(default=0, metadata={"help": "Of resampling and the control."})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Also push the kept rows to this dataset repository on the Hub."}
    )


def main(argv: Sequence[str]) -> int:
    data, arguments, output = parse(
        "filter", DESCRIPTION, (PreferenceArguments, FilterArguments, OutputArguments), argv
    )
    result = filter_preferences(
        data.source(),
        Audit.load(arguments.audit),
        FlagSet.load(arguments.flags),
        arguments.strategy,
        score=_score(arguments.score),
        weights=arguments.weights,
        budget=_budget(arguments.budget),
        threshold=arguments.threshold,
        quantile=arguments.quantile,
        control=arguments.control,
        weight_column=arguments.weight_column,
        on_bad_row=arguments.on_bad_row,
        seed=arguments.seed,
    )
    out = result.save(arguments.output_dir, format=arguments.format, overwrite=arguments.overwrite)
    show(result, out, output)
    if arguments.push_to_hub:
        _push(result, arguments.push_to_hub)
    return 0


def show(result: FilterResult, out: Path, output: OutputArguments) -> None:
    """Print counts, and what is left of the score and of each flag's attribution."""
    summary = result.summary
    controlled = any("attribution_control" in flag for flag in summary["flags"])
    columns: dict[str, Justify] = {"flag": "left", "attribution before": "right", "after": "right"}
    if controlled:
        columns["at random"] = "right"
    rows = [
        [
            str(flag["label"] or flag["feature"]),
            *(
                f"{flag[name]:+.3g}" if name in flag else ""
                for name in ("attribution_before", "attribution_after", "attribution_control")
            ),
        ][: len(columns)]
        for flag in summary["flags"]
    ]
    words = {"before": "before", "after": "after", "control": "at random"}
    score = ", ".join(f"{value:+.3g} {words[when]}" for when, value in summary["score"].items())
    output.show(
        {"output_dir": out, **summary},
        table("What the flagged features are taught", columns, rows),
        f"{summary['kept']} of {summary['rows']} rows kept ({summary['flipped']} flipped, {summary['weighted']} weighted), "
        f"{summary['dropped']} dropped. Mean score: {score}.",
        to_copy(f"Written to {out}"),
    )


def _budget(text: str | float | None) -> str | float | None:
    if text is None or text == BALANCE:
        return text
    try:
        return float(text)
    except ValueError as error:
        raise AuditError(f"--budget {text} is no number; write one, or {BALANCE}.") from error


def _score(text: str) -> str | dict[str, float]:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        raise AuditError(
            f"--score {text} is not valid JSON ({error}); write '{{\"attribution\": 1}}'."
        ) from error


def _push(result: FilterResult, repository: str) -> None:
    kept, dropped = (
        rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
        for rows in (result.kept, result.dropped)
    )
    try:
        DatasetDict(train=kept).push_to_hub(repository)
        dropped.push_to_hub(repository, config_name="dropped")
    except (OSError, ValueError) as error:
        raise AuditError(
            f"The kept rows could not be pushed to {repository!r}: {' '.join(str(error).split())} The files in the output "
            "directory are complete."
        ) from error
