"""`trl-sae-audit label`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..console import Justify, single_line, table
from ..errors import AuditError
from .options import ModelArguments, OutputArguments, options_of
from .parser import option

if TYPE_CHECKING:
    from ..io.feature_labels import Label, LabelScore, LabelSet
    from ..labels.exercises import Source
    from ..labels.replies import KeptReplies
    from ..saes.info import DictionaryInfo

DESCRIPTION = (
    "Labels for the features of an audit or a run: fetched from Neuronpedia, made by a language model from contexts, or read from a file; "
    "then scored on contexts that they were not made from. They go to labels.json beside the audit, and from there into every table, the "
    "report and flags. Exit code 1: labels were scored, and none does better than chance."
)
EXAMPLE = """\
trl-sae-audit label runs/audit --labels_from neuronpedia
trl-sae-audit label runs/audit --labels_from endpoint --model gpt-5-mini
trl-sae-audit label runs/dpo --labels_from model --model ./instruct \\
    --features 50"""


@dataclass
class LabelArguments:
    """The labels."""

    artefact: str = option("Directory of an audit or a run record.", positional=True, metavar="DIRECTORY")
    labels_from: Literal["neuronpedia", "endpoint", "model", "file"] | None = option(
        "Where the labels come from: Neuronpedia's exports; an endpoint that speaks OpenAI's protocol, or a local model, which make them "
        "from contexts; a file. Default: those that are there, to score them.",
        None,
        main=True,
        aliases=["--from"],
    )
    model: str | None = option(
        "What makes and judges labels: a model's name at the endpoint, or a Hugging Face model.",
        None,
        main=True,
        aliases=["--model_name_or_path"],
    )
    features: int = option(
        "Label and score the first N of the ranking; what the run watched too.", 20, main=True
    )
    flags: str | None = option("Also the features that are flagged in this file.", None)
    dictionary: str | None = option(
        "Name of the run's dictionary, if it has several.", None, metavar="NAME", aliases=["--sae"]
    )
    explainer: str | None = option(
        "Whose labels to fetch, where Neuronpedia has several, such as gpt-4o-mini.", None
    )
    labels: str | None = option(
        "For --labels_from file: JSON, JSON lines or CSV with feature and label, or another audit or run record.",
        None,
        metavar="FILE",
    )
    output_dir: str | None = option("Where labels.json is written; default the directory itself.", None)


@dataclass
class ScoreArguments:
    """The scores."""

    judge: Literal["endpoint", "model"] | None = option(
        "What reads the contexts; default what makes the labels. Without one only the lines of words are scored, by where their phrases "
        "occur.",
        None,
    )
    judge_model: str | None = option("The judge, if it is not --model.", None)
    no_scores: bool = option("Score nothing.", False)
    dry_run: bool = option("Say what it would cost, in requests and tokens, and stop.", False)
    seed: int = option("Of the contexts that are drawn.", 0)


@dataclass
class ChatArguments:
    """Endpoint and local model."""

    base_url: str | None = option(
        "Address of the endpoint; default $OPENAI_BASE_URL. The key is in $OPENAI_API_KEY.",
        None,
        metavar="URL",
    )
    exports_url: str | None = option(
        "Address of Neuronpedia's exports, where they are mirrored; default $NEURONPEDIA_EXPORTS.",
        None,
        metavar="URL",
    )
    concurrency: int = option("Requests at once.", 8)
    retries: int = option("Of a request that the endpoint is too busy for.", 5)
    temperature: float | None = option(
        "Of the endpoint's replies; none for models that do not take one.", 0.0
    )
    thinking_tokens: int = option(
        "Tokens that a reasoning model may think before each reply, besides the 32 of a label and the 4 of a verdict.",
        0,
    )
    batch_size: int = option("Conversations at a time of a local model.", 8)
    dtype: Literal["float32", "bfloat16", "float16"] = option("Type of a local model's weights.", "float32")
    device: str | None = option("cpu, cuda, cuda:1 …; default a GPU if there is one.", None)
    trust_remote_code: bool = option("Run code that comes with the model. Only for models you trust.", False)

    def load(self, kind: str, name: str | None) -> KeptReplies:
        """The model of that name."""
        from ..labels.chat import EndpointChat, LocalChat
        from ..labels.replies import KeptReplies

        if self.thinking_tokens < 0:
            raise AuditError(f"--thinking_tokens is {self.thinking_tokens}; give 0 or more.")
        if not name:
            raise AuditError(f"--model must be given, to say which model the {kind} is asked for.")
        if kind == "endpoint":
            how = {
                "concurrency": self.concurrency,
                "retries": self.retries,
                "thinking_tokens": self.thinking_tokens,
            }
            return KeptReplies(EndpointChat(name, self.base_url, temperature=self.temperature, **how))
        arguments = ModelArguments(name, self.dtype, self.device, self.trust_remote_code)
        how = {"batch_size": self.batch_size, "thinking_tokens": self.thinking_tokens}
        return KeptReplies(LocalChat(*arguments.load(), name, **how))


_LABEL = "label, or words"
OPTIONS = (LabelArguments, ScoreArguments, ChatArguments, OutputArguments)


def run(
    arguments: LabelArguments, scores: ScoreArguments, chat: ChatArguments, output: OutputArguments
) -> int:
    from ..labels.exercises import leading_features, make_exercises
    from ..labels.make import cost_of_labels, known_labels, label_exercises
    from ..labels.score import cost_of_scores, score_exercises

    _check(arguments, scores)
    source, dictionary = open_artefact(arguments.artefact, arguments.dictionary)
    known = known_labels(source, dictionary.name)
    explainer = (
        chat.load(arguments.labels_from, arguments.model)
        if arguments.labels_from in ("endpoint", "model")
        else None
    )
    judge = None if scores.no_scores else _load_judge(arguments, scores, chat, explainer)
    found = (
        known
        if explainer is not None or arguments.labels_from is None
        else _get_labels(arguments, chat, dictionary)
    )
    features = leading_features(
        source, arguments.features, dictionary.name, _flagged(arguments.flags, dictionary)
    )
    needed = explainer is not None or not scores.no_scores
    exercises = (
        make_exercises(source, features, dictionary.name, scores.seed)
        if needed and _has_contexts(source)
        else []
    )
    if explainer is None and arguments.labels_from is None and not len(known) and judge is not None:
        raise AuditError(
            f"{arguments.artefact} has no labels to score yet; say with --labels_from where they come from."
        )
    costs = [cost_of_labels(exercises, explainer)] if explainer is not None else []
    if judge is not None:
        costs.append(cost_of_scores(None if explainer is not None else found, exercises, judge))
    for name, cost in zip(
        ("Labels", "Scores") if explainer is not None else ("Scores",), costs, strict=False
    ):
        print(f"{name}: {cost}.", file=sys.stderr)
    if scores.dry_run:
        output.show({"labels": None, "costs": costs}, "Nothing was asked.")
        return 0
    if explainer is not None:
        found = label_exercises(known, exercises, explainer, progress=True)
    if not scores.no_scores:
        found = score_exercises(found, exercises, judge, progress=judge is not None)
    path = found.save(arguments.output_dir or arguments.artefact, options_of(arguments, scores, chat))
    shown = [found.labels[feature] for feature in features if feature in found.labels]
    output.show(
        {
            "labels": path,
            "dictionary": dictionary.name,
            "number": len(found),
            "features": shown,
            "costs": costs,
        },
        *_describe(found, shown, source, dictionary),
        single_line(f"Labels in {path}"),
    )
    scored = [label for label in shown if label.detection is not None]
    return 1 if scored and all(label.is_chance for label in scored) else 0


def open_artefact(directory: str, name: str | None) -> tuple[Source, DictionaryInfo]:
    """The audit or the run record in a directory, and its dictionary, of that name if there are several.

    Raises:
        AuditError: there is neither; the dictionary is not named, or is not there.
    """
    from ..audit.result import Audit
    from ..io.manifest import kind_of
    from ..record.reader import RunRecord
    from ..saes.info import describe

    if kind_of(directory, "audit", "run") == "audit":
        audit = Audit.load(directory)
        return audit, describe(audit.manifest["dictionary"])
    record = RunRecord.load(directory)
    identity = record.labels(name).identity
    return record, next(describe(each) for each in record.dictionaries if each["identity"] == identity)


def _check(arguments: LabelArguments, scores: ScoreArguments) -> None:
    if arguments.features < 0:
        raise AuditError(f"--features is {arguments.features}; give 0 or more.")
    if arguments.labels is not None and arguments.labels_from != "file":
        raise AuditError("--labels names a file; say --labels_from file.")
    if arguments.labels_from == "file" and arguments.labels is None:
        raise AuditError("--labels_from file needs --labels FILE.")
    if arguments.labels_from in ("neuronpedia", "file", None) and arguments.model and scores.judge is None:
        raise AuditError("--model judges these labels; say --judge endpoint or --judge model.")


def _load_judge(
    arguments: LabelArguments, scores: ScoreArguments, chat: ChatArguments, explainer: KeptReplies | None
) -> KeptReplies | None:
    if scores.judge is None and scores.judge_model is None:
        return explainer
    kind = scores.judge or arguments.labels_from
    name = scores.judge_model or arguments.model
    if explainer is not None and (kind, name) == (arguments.labels_from, arguments.model):
        return explainer
    if kind not in ("endpoint", "model"):
        raise AuditError("--judge_model needs --judge endpoint or --judge model.")
    return chat.load(kind, name)


def _get_labels(arguments: LabelArguments, chat: ChatArguments, dictionary: DictionaryInfo) -> LabelSet:
    from ..labels.files import load_labels
    from ..labels.neuronpedia import fetch_labels

    if arguments.labels_from == "file":
        return load_labels(str(arguments.labels), dictionary)
    return fetch_labels(dictionary, explainer=arguments.explainer, base_url=chat.exports_url)


def _flagged(path: str | None, dictionary: DictionaryInfo) -> list[int]:
    from ..flags import FlagSet

    return [flag.feature for flag in FlagSet.load(path).of(dictionary)] if path else []


def _has_contexts(source: Source) -> bool:
    from ..audit.result import Audit

    if isinstance(source, Audit):
        return bool(source.manifest["settings"]["activations"])
    return "contexts" in source.tables


def _words_of(source: Source, dictionary: DictionaryInfo) -> dict[int, str]:
    from ..record.reader import RunRecord

    features = source.features(dictionary.name) if isinstance(source, RunRecord) else source.features()
    known = features["words"].tolist() if "words" in features else []
    return dict(zip(features["feature"].tolist(), known, strict=False))


def _describe(
    labels: LabelSet, shown: Sequence[Label], source: Source, dictionary: DictionaryInfo
) -> list[Any]:
    from ..labels.score import LEAST

    known = [each for each in labels if each.text]
    by = ", ".join(
        dict.fromkeys(f"{each.source}, {each.explainer}" if each.explainer else each.source for each in known)
    )
    judges = ", ".join(dict.fromkeys(each.judge for each in shown if each.judge))
    unscored = sum(bool(each.text and each.judge) and each.detection is None for each in shown)
    words = _words_of(source, dictionary)
    scored = any(each.detection or each.fuzzing for each in shown)
    columns: dict[str, Justify] = {
        "feature": "right",
        _LABEL: "left",
        **({"detection": "left", "fuzzing": "left"} if scored else {}),
        "its words": "left",
    }
    rows = [
        [
            str(each.feature),
            each.text or words.get(each.feature) or "–",
            *([_cell(each.detection, True), _cell(each.fuzzing)] if scored else []),
            _cell(each.words_detection),
        ]
        for each in shown
    ]
    parts: list[Any] = [
        f"{len(known):,} of {dictionary.d_sae:,} features of {dictionary.name} have labels ({by})."
        if known
        else f"No feature of {dictionary.name} has a label: --labels_from says where to get some.",
        table("Features in front", columns, rows, words=_LABEL) if rows else "",
        "Scores are balanced accuracy on contexts that the label was not made from: "
        + (
            "detection, does it fit something in the text; fuzzing, does it fit the marked place; "
            if scored
            else ""
        )
        + "its words, does a phrase of the feature's line of words occur in the text. chance: the 95 % interval "
        "reaches 0.5."
        + (f" Judge: {judges}." if judges else " Labels were not judged: --judge says by what."),
    ]
    if unscored:
        parts.append(
            f"{unscored} of these labels have no score: fewer than {LEAST} contexts of either kind were answered with Yes or No. Where the "
            "contexts are enough, take a larger judge (--judge_model)."
        )
    if "kind" in source.manifest and source.manifest["kind"] == "run":
        parts.append(
            "A run's record does not say where a feature is silent: contexts of other features stand for that, and a feature that is active "
            "nearly everywhere scores lower than it deserves."
        )
    return parts


def _cell(score: LabelScore | None, interval: bool = False) -> str:
    if score is None:
        return "–"
    if score.is_chance:
        return f"{score.accuracy:.2f} chance"
    return (
        f"{score.accuracy:.2f} [{score.low:.2f}, {score.high:.2f}]" if interval else f"{score.accuracy:.2f}"
    )
