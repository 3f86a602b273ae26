"""`trl-sae-audit diff`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..console import Justify, table
from .examples import examples_of, sample_rows
from .options import DictionaryArguments, ModelArguments, OutputArguments
from .origins import known_options, origins
from .parser import option

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

    from ..io.feature_labels import LabelSet
    from ..saes.dictionary import FeatureDictionary
    from ..verification.diff import ModelDiff

DESCRIPTION = (
    "Two checkpoints, feature by feature: what rose and fell in what they write (both answer the same prompts, the one before reads all "
    "answers) and in how they read (both read the answers of the one before), with words and 95 % intervals over the prompts. No audit "
    "and no run record is needed; but in place of the two models the record of a run may be given, which knows them, the dictionary and the data."
)
EXAMPLE = """\
trl-sae-audit diff runs/dpo/sae_audit
trl-sae-audit diff ./model ./trained --dictionary ./sae \\
    --dataset held_out.jsonl"""


@dataclass
class DiffArguments:
    """The difference."""

    before: str = option(
        "Directory of the model before, or its name on the Hub; or of a run's record.", positional=True
    )
    after: str = option("Directory of the model after, or of its adapter.", positional=True)
    dataset: str = option(
        "What is answered: a file, folder or dataset whose rows have a 'prompt'.",
        aliases=["--dataset_name"],
        metavar="FILE",
    )
    split: str | None = option("Split, of a dataset that has several; default train.", None)
    max_rows: int | None = option("Use the first rows only.", None)
    top: int = option("Features to print of each kind.", 10, main=True)
    labels: str | None = option(
        "Labels to show before the words: an audit or a run record that has some, or a file; default those of the run's record, where "
        "one is given.",
        None,
        metavar="FILE",
    )
    samples: int = option("Answers to sample at each prompt.", 4)
    max_new_tokens: int = option("Longest sampled answer.", 128)
    temperature: float = option("Of the sampling.", 1.0)
    batch_size: int = option("Answers at a time.", 32)
    seed: int = option("Of the sampling.", 0)
    output: str | None = option(
        "Also write the whole tables, as CSV: this file of what they write, and beside it -reads of how they read and -samples of answers side by side.",
        None,
        metavar="FILE.csv",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("Type of the models' weights.", "float32")
    device: str | None = option("cpu, cuda, cuda:1 …; default a GPU if there is one.", None)
    trust_remote_code: bool = option("Run code that comes with the model. Only for models you trust.", False)


def _known(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the record of a run in place of the model before; its name is then the model's."""
    return known_options("before", given) if "after" not in given else {}


_EXAMPLES = 3
KNOWN = {
    "known": _known,
    "may_be_known": ("after", "dataset", "dictionary", "sae_id", "hook_point", "transcoder"),
}
OPTIONS = (DiffArguments, DictionaryArguments, OutputArguments)


def run(arguments: DiffArguments, dictionary_arguments: DictionaryArguments, output: OutputArguments) -> int:
    from ..models.sampling import Sampling
    from ..record.reader import RunRecord
    from ..verification.diff import diff_models
    from .options import PreferenceArguments
    from .trained_model import check_saved, check_trained

    known = origins(arguments.before)
    record = RunRecord.load(arguments.before) if known.get("after") == arguments.after else None
    if record is not None:
        check_saved(record, arguments.after, "AFTER")
    dictionary = dictionary_arguments.load()
    rows = PreferenceArguments(arguments.dataset, arguments.split, arguments.max_rows).source()
    how = (arguments.dtype, arguments.device, arguments.trust_remote_code)
    before, tokenizer = ModelArguments(known.get("model", arguments.before), *how).load()
    after, _ = ModelArguments(arguments.after, *how).load()
    if record is not None:
        check_trained(record, after, arguments.after, "AFTER")
    sampling = Sampling(arguments.samples, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    found = diff_models(
        before,
        after,
        tokenizer,
        dictionary,
        rows,
        sampling=sampling,
        batch_size=arguments.batch_size,
        labels=_labels(arguments, dictionary),
        flagged=watched_of(arguments.before, dictionary.identity),
        progress=True,
    )
    if arguments.output:
        _write(found, arguments.output)
    show(found, arguments.top, output)
    return 0


def watched_of(directory: str, identity: str) -> list[int]:
    """The features of a dictionary that a run watched; none where the directory has no record of a run."""
    from pathlib import Path

    from ..io.manifest import MANIFEST, read_manifest

    if not (Path(directory) / MANIFEST).is_file():
        return []
    manifest = read_manifest(directory, "run", "audit")
    watch = (manifest.get("config") or {}).get("watch") or {}
    names = [each["name"] for each in manifest.get("dictionaries", []) if each["identity"] == identity]
    return [feature for name in names for feature in watch.get(name, {}).values()]


def _labels(arguments: DiffArguments, dictionary: FeatureDictionary) -> LabelSet | None:
    """Those that were named, or those of the run's record in place of the model before."""
    from ..io.feature_labels import labels_of
    from ..labels.files import load_labels

    if arguments.labels is not None:
        return load_labels(arguments.labels, dictionary)
    if origins(arguments.before):
        return labels_of(arguments.before, dictionary.name, dictionary.identity)
    return None


def show(found: ModelDiff, top: int, output: OutputArguments) -> None:
    """Print what rose and fell, in what they write and how they read."""
    from ..io.feature_labels import captions

    document: dict[str, Any] = {
        "dictionary": found.dictionary,
        "prompts": found.prompts,
        "answers": found.answers,
    }
    parts: list[RenderableType] = []
    for kind, title in (("writes", "What they write"), ("reads", "How they read the same text")):
        frame: pd.DataFrame = getattr(found, kind)
        beyond = found.beyond_chance(kind)
        document[kind] = {
            "features": len(frame),
            "beyond_chance": len(beyond),
            "top": frame.head(top).to_dict("records"),
        }
        told = f"{title}: {len(beyond)} of {len(frame)} active features changed beyond chance"
        parts.append(table_of(told, frame.head(top)))
    words = dict(zip(found.writes["feature"].tolist(), captions(found.writes), strict=True))
    document["samples"] = sample_rows(found.samples)
    output.show(
        document,
        *parts,
        *examples_of(found.samples, words, _EXAMPLES),
        f"{found.answers} answers of each checkpoint to {found.prompts} prompts. Change: of the mean activation a token, ± its 95 % interval "
        "over the prompts; effect: in standard deviations over prompts; "
        "beyond chance: q < 0.05.",
    )


def table_of(title: str, rows: pd.DataFrame) -> RenderableType:
    """Features with their change, first those told from chance."""
    from ..io.feature_labels import caption

    columns: dict[str, Justify] = dict.fromkeys(
        ("feature", "change", "±", "effect", "q", "before", "after"), "right"
    )
    cells = [
        [
            str(row["feature"]),
            f"{row['change']:+.1e}",
            f"{(row['high'] - row['low']) / 2:.0e}",
            f"{row['effect_size']:+.2f}",
            f"{row['q_value']:.2g}",
            f"{row['before']:.1e}",
            f"{row['after']:.1e}",
            caption(row) or "–",
        ]
        for row in rows.to_dict("records")
    ]
    return table(title, {**columns, "words": "left"}, cells, words="words", optional=["after", "before"])


def _write(found: ModelDiff, output: str) -> None:
    from pathlib import Path

    import pandas as pd

    from ..errors import AuditError

    target = Path(output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        found.writes.to_csv(target, index=False)
        found.reads.to_csv(target.with_name(f"{target.stem}-reads{target.suffix}"), index=False)
        samples = pd.DataFrame(sample_rows(found.samples), columns=["prompt", "change", "before", "after"])
        samples.to_csv(target.with_name(f"{target.stem}-samples{target.suffix}"), index=False)
    except OSError as error:
        raise AuditError(
            f"The tables cannot be written to {target} ({error.strerror}); choose another --output."
        ) from error
