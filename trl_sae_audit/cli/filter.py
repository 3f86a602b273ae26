"""`trl-sae-audit filter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..console import Justify, single_line, table
from ..errors import AuditError
from .options import OutputArguments, PreferenceArguments
from .parser import option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..audit.result import Audit
    from ..filtering.api import FilterResult
    from ..filtering.scores import ScoreName
    from ..flags import FlagSet

DESCRIPTION = (
    "Remove the pairs that teach flagged features, and write what stays, what leaves and why. By default as many leave as it takes for the flagged "
    "features to say nothing about which answer was preferred; then a step on what stays is predicted again, and the command says "
    "how the flagged features and all others would now move."
)
EXAMPLE = """\
trl-sae-audit filter pairs.jsonl --flags flags.yaml --output_dir data/filtered"""


@dataclass
class FilterData(PreferenceArguments):
    """The preference pairs."""

    dataset: str = option(
        "The data that was audited: a file .jsonl, .json, .csv or .parquet (also .gz), a folder of them, a directory made by "
        "save_to_disk, or the name of a dataset on the Hub.",
        positional=True,
        metavar="DATASET",
        aliases=["--dataset_name"],
    )


@dataclass
class FilterArguments:
    """The filter."""

    output_dir: str = option("Made; holds the kept and the dropped rows and a dataset card.")
    flags: str = option("The flagged features.", "flags.yaml", main=True)
    audit: str | None = option(
        "Directory of the audit of this dataset; default the one that the flags were set in.", None, main=True
    )
    strategy: Literal["drop", "flip", "resample", "weight"] = option(
        "drop them; flip chosen and rejected; resample, as many rows as before, some left out and others repeated; weight, add a "
        "column with a weight, for a loss of your own: no trainer of TRL reads one.",
        "drop",
        main=True,
    )
    score: str = option(
        "max_activation, activation, attribution, activation_attribution, influence, or a mix: "
        '\'{"max_activation": 1, "influence": 1}\'.',
        "max_activation",
    )
    weights: Literal["fit", "flags"] = option(
        "Add flags up by what explains the preferences best, or by their own weights.", "fit"
    )
    budget: str | None = option(
        "balance: of rows like each one the share that leaves those for and against the flags equally frequent. Or at most this many "
        "rows, or below 1 this share of them. Default balance, where neither --threshold nor --quantile is given.",
        None,
        main=True,
    )
    threshold: float | None = option("Rows with a score above this.", None)
    quantile: float | None = option("Rows with a score above this quantile of the scores.", None)
    check: bool = option(
        "Predict again what a step on the kept rows does, with the audit's model.",
        True,
        negative="Do not predict again what a step on the kept rows does.",
    )
    control: bool = option("Also write a control: as many rows at random.", False)
    weight_column: str = option("Column for strategy weight.", "weight")
    on_bad_row: Literal["stop", "set_aside"] = option(
        "What to do at a row that is no pair; set aside, it goes to the dropped.", "stop"
    )
    format: Literal["jsonl", "parquet", "dataset"] | None = option(
        "jsonl, parquet or dataset; default the input's own.", None
    )
    overwrite: bool = option("Replace what an earlier run wrote.", False)
    seed: int = option("Of the control.", 0)
    push_to_hub: str | None = option("Also push the kept rows to this dataset repository on the Hub.", None)


OPTIONS = (FilterData, FilterArguments, OutputArguments)


def run(data: PreferenceArguments, arguments: FilterArguments, output: OutputArguments) -> int:
    from ..filtering.api import filter_preferences
    from ..flags import FlagSet

    flags = FlagSet.load(arguments.flags)
    audit, unchecked = _open_audit(arguments.audit or audit_of(flags, arguments.flags), arguments.check)
    result = filter_preferences(
        data.source(),
        audit,
        flags,
        arguments.strategy,
        score=_parse_score(arguments.score),
        weights=arguments.weights,
        budget=_parse_budget(arguments.budget),
        threshold=arguments.threshold,
        quantile=arguments.quantile,
        control=arguments.control,
        weight_column=arguments.weight_column,
        on_bad_row=arguments.on_bad_row,
        check=arguments.check,
        seed=arguments.seed,
    )
    if arguments.check and not unchecked and result.check is None:
        unchecked = (
            "What is kept was not checked: none of it is among the pairs on which the audit predicted a step."
        )
    result.plan.settings.update(dataset=data.dataset, split=data.split, max_rows=data.max_rows)
    out = result.save(arguments.output_dir, format=arguments.format, overwrite=arguments.overwrite)
    show(result, out, output, unchecked)
    if arguments.push_to_hub:
        _push_to_hub(result, arguments.push_to_hub)
    return 0


def audit_of(flags: FlagSet, path: str) -> str:
    """The directory of the audit that flags were set in.

    Raises:
        AuditError: they do not say, or were set in several.
    """
    named = sorted({flag.audit for flag in flags if flag.audit is not None})
    if len(named) != 1:
        found = (
            f"are of several audits ({', '.join(named)})"
            if named
            else "do not say in which audit they were set"
        )
        raise AuditError(f"The flags in {path} {found}; pass --audit with the directory of this dataset's.")
    if not Path(named[0]).is_dir():
        raise AuditError(
            f"The flags in {path} were set in the audit {named[0]}, which is not there any more; pass --audit with where it is."
        )
    return named[0]


def _open_audit(directory: str, check: bool) -> tuple[Audit, str]:
    """The audit, with its model where the kept rows are to be checked; and why they cannot be."""
    from ..audit.result import Audit

    audit = Audit.load(directory)
    if not check:
        return audit, ""
    about = audit.lookahead
    if about is None or about["sampling"] is None:
        return audit, "What is kept was not checked: the audit has no lookahead to generations."
    from .audit import reopen_audit

    try:
        return reopen_audit(directory), ""
    except AuditError as error:
        return audit, f"What is kept was not checked. {error}"


def show(result: FilterResult, out: Path, output: OutputArguments, unchecked: str = "") -> None:
    """Print what the kept rows are predicted to teach, counts, and what is left of each flag's disparity and attribution."""
    from ..filtering.check import describe_check

    summary = result.summary
    document = {"output_dir": out, **summary}
    words = {"before": "before", "after": "after", "control": "at random"}
    score = ", ".join(f"{value:+.3g} {words[when]}" for when, value in summary["score"].items())
    counts = ", ".join(
        f"{summary[name]} {name}" for name in ("dropped", "flipped", "weighted", "repeated") if summary[name]
    )
    output.show(
        document if not unchecked else document | {"unchecked": unchecked},
        _flag_table(summary),
        *_tell_words(summary),
        f"{summary['kept']} of {summary['rows']} rows kept ({counts or 'all as they are'}). Mean score: {score}.",
        *_remarks(result),
        *(describe_check(summary["check"]) if "check" in summary else [unchecked] if unchecked else []),
        single_line(f"Written to {out}"),
    )


def _remarks(result: FilterResult) -> list[str]:
    if result.plan.settings["strategy"] == "weight":
        column = result.plan.settings["weight_column"]
        return [
            f"No trainer of TRL reads the column {column!r}: it is for a loss of your own. --strategy resample does the same for any trainer, "
            "shape_preference_margin for DPO."
        ]
    if (result.plan.action != "keep").any() or result.plan.settings["budget"] != "balance":
        return []
    return [
        "The flagged features say nothing about which answer was preferred, so there is nothing to remove. What an audit predicts of "
        "them comes from something else in the pairs; flag that, or shape the reward."
    ]


def _flag_table(summary: Mapping[str, Any]) -> RenderableType:
    """Effect sizes first where there was a check, then disparities, then attributions."""
    flags = summary["flags"]
    predicted = summary.get("check", {}).get("flags", [{}] * len(flags))
    groups: list[tuple[str, Sequence[Mapping[str, Any]], str, str]] = [
        ("effect size", predicted, "", "+.2g"),
        ("disparity", flags, "disparity_", "+.2f"),
        ("attribution", flags, "attribution_", "+.2g"),
    ]
    columns: dict[str, Justify] = {"flag": "left"}
    optional: list[str] = []
    cells: list[list[str]] = [[str(flag["label"] or flag["feature"])] for flag in flags]
    for title, entries, prefix, form in groups:
        for when, heading in (("before", f"{title}\nbefore"), ("after", "after"), ("control", "at random")):
            name = f"{prefix}{when}"
            if name not in entries[0]:
                continue
            column = heading if heading not in columns else f"{heading} " + " " * len(columns)
            columns[column] = "right"
            if title == "attribution":
                optional.append(column)
            for row, entry in zip(cells, entries, strict=True):
                margin = entry.get(f"{name}_margin")
                row.append(format(entry[name], form) + (f" ± {margin:.2f}" if margin is not None else ""))
    return table(
        "What the flagged features are taught (±: 95 % interval)", columns, cells, optional=optional[::-1]
    )


def _tell_words(summary: Mapping[str, Any]) -> list[RenderableType]:
    """What each flagged feature is active on; beside the figures there is no room for it."""
    flags = [
        [str(flag["label"] or flag["feature"]), flag["words"]] for flag in summary["flags"] if flag["words"]
    ]
    columns: dict[str, Justify] = {"flag": "left", "words": "left"}
    return [table("What they are active on", columns, flags, words="words")] if flags else []


def _parse_budget(text: str | None) -> float | Literal["balance"] | None:
    if text is None:
        return None
    if text == "balance":
        return "balance"
    try:
        return float(text)
    except ValueError as error:
        raise AuditError(f"--budget {text} is no number; write one, or balance.") from error


def _parse_score(text: str) -> ScoreName | dict[str, float]:
    if not text.lstrip().startswith("{"):
        return cast("ScoreName", text)  # the filter refuses another
    from ..io.untrusted import parse_json

    try:
        return parse_json(text)
    except ValueError as error:
        raise AuditError(
            f"--score {text} is not valid JSON ({error}); write '{{\"attribution\": 1}}'."
        ) from error


def _push_to_hub(result: FilterResult, repository: str) -> None:
    from datasets import Dataset, DatasetDict

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
