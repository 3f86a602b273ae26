"""`trl-sae-audit verify`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..console import Justify, table
from ..errors import AuditError
from .examples import examples_of, sample_rows
from .options import DictionaryArguments, ModelArguments, OutputArguments, PreferenceArguments, options_of
from .origins import ROWS_OF_A_RUN, known_options, origins
from .parser import option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..audit.result import Audit
    from ..record.reader import RunRecord
    from ..verification.comparison import Verification

DESCRIPTION = (
    "Did the scores predict what training did? Compares the scores of an audit (or the drift, selection and attribution in a run's record) with "
    "the change of each feature between the model before and the model after training: on given text (held-out answers) "
    "and in generations (answers that both sample, encoded by the model before). --model is the model before training, --dataset held-out pairs. After one of the scripts "
    "the run's record says all of that, and an audit all but the model after training."
)
EXAMPLE = """\
trl-sae-audit verify runs/dpo/sae_audit
trl-sae-audit verify runs/audit --model ./model --after ./trained \\
    --dictionary ./sae --dataset held_out.jsonl"""

SEED_OFFSET = 1_000_000
"""Added to the seed of sampling. An audit's lookahead to generations begins from samples of that model too: were they
the very samples measured here, their noise would be both in the prediction and in what it is compared with."""


@dataclass
class VerifyArguments:
    """The verification."""

    source: str = option(
        "Directory of the audit or of the run's record.", positional=True, metavar="DIRECTORY"
    )
    after: str = option("Directory of the model after training, or of its adapter.", metavar="MODEL")
    output_dir: str | None = option("Where to write figures and table; `report` reads them.", None, main=True)
    samples: int = option("Answers to sample at each held-out prompt; 0 leaves sampling out.", 1)
    max_new_tokens: int = option("Longest sampled answer.", 128)
    temperature: float = option("Of the sampling.", 1.0)
    max_length: int = option("Tokens at which prompt and answer are cut.", 1024)
    batch_size: int = option("Answers at a time.", 16)
    top_k: int = option("Features that the top-k precision looks at.", 20)
    draws: int = option("Bootstrap resamples of the prompts.", 500)
    seed: int = option("Of sampling and resampling.", 0)


KNOWN = {
    "known": lambda given: known_options("source", given),
    "may_be_known": ("model", "after", "dataset", "dictionary", "sae_id", "hook_point", "transcoder"),
}
OPTIONS = (VerifyArguments, ModelArguments, PreferenceArguments, DictionaryArguments, OutputArguments)


def run(
    arguments: VerifyArguments,
    model_arguments: ModelArguments,
    data: PreferenceArguments,
    dictionary_arguments: DictionaryArguments,
    output: OutputArguments,
) -> int:
    from ..audit.result import Audit
    from ..io.feature_labels import captions
    from ..models.sampling import Sampling
    from ..verification.comparison import predictors_of, save_verifications, verify
    from ..verification.diff import SIGNIFICANT, change_table
    from ..verification.measured import MeasuredChange, measured_change, read_answers, sample_answers
    from ..verification.samples import choose_features, read_samples
    from .trained_model import check_saved, check_trained

    source = read_source(arguments.source)
    dictionary = dictionary_arguments.load()
    name = check_dictionary_of(source, dictionary.identity, dictionary.name)
    rows = data.source()
    from_record = origins(arguments.source).get("after") == arguments.after
    record = source if from_record and not isinstance(source, Audit) else None
    if record is not None:
        check_saved(record, arguments.after, "--after")
    before, tokenizer = model_arguments.load()
    after, _ = replace(model_arguments, model=arguments.after).load()
    if record is not None:
        check_trained(record, after, arguments.after, "--after")
    common: dict[str, Any] = {"batch_size": arguments.batch_size, "progress": True}
    sinks = counts_attention_sinks(source)
    changes = [
        measured_change(
            before,
            after,
            tokenizer,
            dictionary,
            rows,
            max_length=arguments.max_length,
            attention_sinks=sinks,
            **common,
        )
    ]
    samples, unchanged = None, False
    if arguments.samples:
        sampling = Sampling(
            arguments.samples, arguments.max_new_tokens, arguments.temperature, arguments.seed + SEED_OFFSET
        )
        written = [
            sample_answers(each, tokenizer, rows, sampling=sampling, **common) for each in (before, after)
        ]
        unchanged = written[0] == written[1]
    if arguments.samples and not unchanged:
        read = [
            read_answers(before, tokenizer, dictionary, each, attention_sinks=sinks, **common)
            for each in written
        ]
        changes.append(MeasuredChange("in generations", read[0], read[1]))
        if len(changes[-1]) > 1:  # one prompt tells nothing from chance
            table = change_table(read[0], read[1], {})
            features = choose_features(table, SIGNIFICANT, watched_in(source, name))
            samples = read_samples(
                before, tokenizer, dictionary, written[0], written[1], changes[-1], features
            )
    predictors = predictors_of(source, name)
    verifications = [
        verify(predictors, change, top_k=arguments.top_k, draws=arguments.draws, seed=arguments.seed)
        for change in changes
    ]
    about = {
        "source": arguments.source,
        "before": model_arguments.model,
        "after": arguments.after,
        "dataset": data.dataset,
        "dictionary": {"name": dictionary.name, "identity": dictionary.identity},
    }
    if arguments.output_dir:
        options = options_of(arguments, model_arguments, data, dictionary_arguments)
        save_verifications(verifications, arguments.output_dir, options, samples)
    scored = source.features() if isinstance(source, Audit) else source.features(name)
    words = dict(zip(scored["feature"].tolist(), captions(scored), strict=True))
    document = {
        **about,
        "targets": {each.kind: each.to_dict() for each in verifications},
        "samples": sample_rows(samples),
        "same_answers": unchanged,
    }
    of_the_run = not isinstance(source, Audit) and data.dataset == origins(arguments.source).get("dataset")
    output.show(
        document,
        *(part for each in verifications for part in (table_of(each), changes_of(each, words))),
        *examples_of(samples, words, 1),
        *([UNCHANGED] if unchanged else []),
        EXPLANATION,
        *([TRAINED_ON] if of_the_run else []),
    )
    return 0


def read_source(path: str) -> Audit | RunRecord:
    """The audit or the record in a directory.

    Raises:
        AuditError: neither is there.
    """
    from ..audit.result import Audit
    from ..io.manifest import kind_of
    from ..record.reader import RunRecord

    return RunRecord.load(path) if kind_of(path, "run", "audit") == "run" else Audit.load(path)


def counts_attention_sinks(source: Audit | RunRecord) -> bool:
    """Whether the scores count features as active at attention sinks, so that what they predict is measured likewise."""
    from ..audit.result import Audit

    options = source.manifest.get("settings" if isinstance(source, Audit) else "config") or {}
    return options.get("attention_sinks") is True


def watched_in(source: Audit | RunRecord, dictionary: str) -> list[int]:
    """The features that a run watched; an audit watches none."""
    watched: dict[str, int] = (source.manifest.get("config") or {}).get("watch", {}).get(dictionary, {})
    return list(watched.values())


def check_dictionary_of(source: Audit | RunRecord, identity: str, name: str) -> str:
    """The name that the source has for the dictionary of that content.

    Raises:
        AuditError: it scored another one.
    """
    from ..audit.result import Audit

    if isinstance(source, Audit):
        known = {source.dictionary.identity: source.dictionary.name}
    else:
        known = {entry["identity"]: entry["name"] for entry in source.dictionaries}
    if identity not in known:
        raise AuditError(
            f"The dictionary {name!r} is not the one that was scored ({', '.join(known.values())}): their directions differ; "
            "pass --dictionary with the same one."
        )
    return known[identity]


TRAINED_ON = f"These are pairs that the run trained on (the first {ROWS_OF_A_RUN}, unless --max_rows says otherwise): pass --dataset for held-out ones."
UNCHANGED = (
    "In generations nothing has changed yet: both models wrote the same answers to all prompts. Train for longer, or look at more "
    "with --samples, --max_new_tokens and --max_rows."
)
EXPLANATION = (
    "R²: how much of the features' change a line through the score explains (a wrong sign explains nothing). "
    "Top: how many of the features with the largest scores are among those with the largest change, same sign. "
    "'random' is a control. In brackets 95 % intervals over the prompts; other training seeds may differ by more."
)
_LONGEST_NAME = 26
_STATISTICS = (("r2", 1.0, ".2f"), ("spearman", 1.0, "+.2f"), ("precision", 100.0, ".0f"))


def table_of(verification: Verification) -> RenderableType:
    """How well each score predicted one kind of change, in 80 columns."""
    from ..report.text import describe_ceiling
    from ..verification.comparison import RANDOM

    best = max(
        verification.statistics[name]["r2"].estimate for name in verification.statistics if name != RANDOM
    )
    title = (
        f"{verification.kind}: {len(verification.features)} active features, {verification.units} prompts\n"
        f"{describe_ceiling(verification.ceiling, best)}"
    )
    columns: dict[str, Justify] = {"score": "left"}
    columns |= dict.fromkeys(("R²", "Spearman ρ", f"top {verification.top_k}, %"), "right")
    rows = [
        [_fold_name(row["score"]), *(_cell(row, *statistic) for statistic in _STATISTICS)]
        for row in verification.table.to_dict("records")
    ]
    return table(title, columns, rows)


def _fold_name(score: str) -> str:
    """A long name on two lines, broken at a word, so that 80 columns hold the table."""
    if len(score) <= _LONGEST_NAME:
        return score
    end = score.rfind("_", 0, _LONGEST_NAME) + 1
    return f"{score[:end]}\n{score[end:]}"


def _cell(row: Mapping[Hashable, Any], name: str, unit: float, form: str) -> str:
    value, low, high = (format(unit * row[key], form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"


def changes_of(found: Verification, words: Mapping[int, str], most: int = 5) -> RenderableType:
    """The features that changed most, in units of the standard error over prompts, with their words."""
    from ..statistics import NORMAL_QUANTILE

    frame = found.features
    size = (frame["measured"] / frame["standard_error"].where(lambda error: error > 0)).abs().fillna(0)
    rows = frame.loc[size.nlargest(most).index].to_dict("records")
    columns: dict[str, Justify] = dict.fromkeys(("feature", "before", "change", "±"), "right")
    cells = [
        [
            str(row["feature"]),
            f"{row['before']:.1e}",
            f"{row['measured']:+.1e}",
            f"{NORMAL_QUANTILE * row['standard_error']:.0e}",
            words.get(row["feature"]) or "–",
        ]
        for row in rows
    ]
    return table(f"{found.kind}: largest changes", {**columns, "words": "left"}, cells, words="words")
