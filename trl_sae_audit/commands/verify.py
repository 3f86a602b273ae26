"""`trl-sae-audit verify`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..audit_result import Audit
from ..errors import AuditError
from ..realised import realised_change, sampled_change
from ..record import RunRecord
from ..sae import load_dictionary
from ..sampling import Sampling
from ..terminal import Justify, OutputArguments, table
from ..untrusted import read_json
from ..verification import RANDOM, Verification, predictors_of, save_verifications, verify
from .arguments import ModelArguments, load_model, parse
from .preferences import PreferenceArguments, first_as_option

DESCRIPTION = (
    "Did the scores predict what training did? Compares the scores of an audit (or the attribution in a run's record) with "
    "the change of each feature between the model before and the model after training: on held-out answers that both read, "
    "and on answers that both sample and the model before reads. Example: trl-sae-audit verify runs/audit "
    "--model_name_or_path ./model --after ./trained --sae ./sae --dataset held_out.jsonl"
)

OTHER_LUCK = 1_000_000
"""Added to the seed of sampling. An audit's lookahead to what the model writes begins from samples of that model too: were they
the very samples measured here, their noise would stand in the prediction and in what it is compared with."""


@dataclass
class VerifyArguments:
    """What is verified. `--model_name_or_path` is the model before training, `--dataset` held-out pairs."""

    source: str = field(
        metadata={"help": "Directory of the audit or of the run's record; may stand first, without --source."}
    )
    after: str = field(metadata={"help": "Directory of the model after training, or of its adapter."})
    sae: str = field(
        metadata={"help": "A directory saved by sae-lens, or a sae-lens release (with --sae_id)."}
    )
    sae_id: str | None = field(default=None, metadata={"help": "Which SAE of the release."})
    hook_point: str | None = field(
        default=None, metadata={"help": "Read here instead of where the SAE says it hooks."}
    )
    samples: int = field(
        default=1, metadata={"help": "Answers to sample at each held-out prompt; 0 leaves sampling out."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest sampled answer."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling."})
    max_length: int = field(default=1024, metadata={"help": "Tokens at which prompt and answer are cut."})
    batch_size: int = field(default=16, metadata={"help": "Answers at a time."})
    top_k: int = field(default=20, metadata={"help": "Features that the top-k precision looks at."})
    draws: int = field(default=500, metadata={"help": "Bootstrap resamples of the prompts."})
    seed: int = field(default=0, metadata={"help": "Of sampling and resampling."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where to write verify.json and verify.parquet; `report` reads them."}
    )


def main(argv: Sequence[str]) -> int:
    model_arguments, data, arguments, output = parse(
        "verify",
        DESCRIPTION,
        (ModelArguments, PreferenceArguments, VerifyArguments, OutputArguments),
        first_as_option(argv, "source"),
    )
    source = read_source(arguments.source)
    dictionary = load_dictionary(arguments.sae, arguments.sae_id, hook_point=arguments.hook_point)
    name = check_dictionary_of(source, dictionary.identity, dictionary.name)
    rows = data.source()
    before, tokenizer = load_model(model_arguments)
    after, _ = load_model(replace(model_arguments, model_name_or_path=arguments.after))
    common: dict[str, Any] = {"batch_size": arguments.batch_size, "progress": True}
    changes = [
        realised_change(before, after, tokenizer, dictionary, rows, max_length=arguments.max_length, **common)
    ]
    if arguments.samples:
        sampling = Sampling(
            arguments.samples, arguments.max_new_tokens, arguments.temperature, arguments.seed + OTHER_LUCK
        )
        changes.append(
            sampled_change(before, after, tokenizer, dictionary, rows, sampling=sampling, **common)
        )
    predictors = predictors_of(source, name)
    found = [
        verify(predictors, change, top_k=arguments.top_k, draws=arguments.draws, seed=arguments.seed)
        for change in changes
    ]
    about = {
        "source": arguments.source,
        "before": model_arguments.model_name_or_path,
        "after": arguments.after,
        "dataset": data.dataset,
        "dictionary": {"name": dictionary.name, "identity": dictionary.identity},
    }
    if arguments.output_dir:
        save_verifications(found, arguments.output_dir, about)
    document = {**about, "targets": {each.kind: each.to_dict() for each in found}}
    output.show(document, *(table_of(each) for each in found), EXPLANATION)
    return 0


def read_source(path: str) -> Audit | RunRecord:
    """The audit or the record in a directory.

    Raises:
        AuditError: neither is there.
    """
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        raise AuditError(f"{path} holds neither an audit nor a run's record; give the directory of one.")
    try:
        is_record = "dictionaries" in read_json(manifest)
    except (OSError, ValueError, TypeError) as error:
        raise AuditError(f"{manifest} cannot be read ({error}); restore it from a copy.") from error
    return RunRecord.load(path) if is_record else Audit.load(path)


def check_dictionary_of(source: Audit | RunRecord, identity: str, name: str) -> str:
    """The name that the source has for the dictionary of that content.

    Raises:
        AuditError: it scored another one.
    """
    if isinstance(source, Audit):
        known = {source.dictionary.identity: source.dictionary.name}
    else:
        known = {entry["identity"]: entry["name"] for entry in source.dictionaries}
    if identity not in known:
        raise AuditError(
            f"The dictionary {name!r} is not the one that was scored ({', '.join(known.values())}): their directions differ; "
            "pass --sae with the same one."
        )
    return known[identity]


EXPLANATION = (
    "R²: how much of the features' change a line through the score explains (a wrong sign explains nothing). "
    "Top: how many of the features with the largest scores are among those with the largest change, same sign. "
    f"{RANDOM!r} is a control. In brackets 95 % intervals over the prompts; other training seeds may differ by more."
)
_STATISTICS = (("r2", 1.0, ".2f"), ("spearman", 1.0, "+.2f"), ("precision", 100.0, ".0f"))


def table_of(found: Verification) -> Table:
    """How well each score predicted one kind of change, in 80 columns."""
    title = (
        f"{found.kind}: {len(found.features)} active features, {found.units} prompts; a perfect score: R² "
    )
    columns: dict[str, Justify] = {"score": "left"}
    columns |= dict.fromkeys(("R²", "Spearman ρ", f"top {found.top_k}, %"), "right")
    rows = [
        [row["score"], *(_cell(row, *statistic) for statistic in _STATISTICS)]
        for row in found.table.to_dict("records")
    ]
    made = table(f"{title}{found.ceiling:.2f}", columns, rows)
    made.show_edge = made.pad_edge = False
    made.collapse_padding = True
    return made


def _cell(row: Mapping[Hashable, Any], name: str, unit: float, form: str) -> str:
    value, low, high = (format(unit * row[key], form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"
