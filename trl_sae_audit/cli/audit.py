"""`trl-sae-audit audit`."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AuditError, DirectoryTakenError
from .audit_dictionary import AUTO, TRAIN, dictionary_of
from .audit_table import show
from .options import DictionaryArguments, ModelArguments, OutputArguments, PreferenceArguments, options_of
from .parser import option, parse_options
from .reward_audit import RewardArguments, check_objective, grpo_config, load_judge, load_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import DPOConfig, GRPOConfig

    from ..audit.lookahead.config import LookaheadConfig
    from ..audit.result import Audit
    from ..saes.dictionary import FeatureDictionary

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Which features would this preference data, or this reward, teach? Before any training: what an optimizer step on the data does "
    "to each feature in the model's own answers, to prompts held out of the data; what the data select for; and the gradient of each "
    "pair's loss at the dictionary's hook point, with statistics. For a reward the same on answers that the model samples, as GRPO "
    "would reward them. An interrupted audit goes on when the same command is run again; several processes share the work under "
    "`accelerate launch`. Exit code 1: what --fail_on rules out is so."
)
EXAMPLE = """\
trl-sae-audit audit --model ./model --dataset pairs.jsonl
trl-sae-audit audit --model ./model --dataset pairs.jsonl --dictionary ./sae \\
    --output_dir runs/audit
trl-sae-audit audit --model ./model --dataset prompts.jsonl \\
    --dictionary ./sae --objective policy_gradient \\
    --reward my_rewards:brevity --output_dir runs/reward"""


@dataclass
class AuditArguments:
    """The audit."""

    output_dir: str | None = option(
        "Where the audit is written; `flag` and `filter` read it. Default runs/audit-MODEL-DATASET, numbered where that has another audit.",
        None,
        main=True,
    )
    objective: Literal["dpo", "policy_gradient", "reward_model"] = option(
        "What is audited: pairs, as DPO learns from them; what a reward teaches a policy (--reward, --reward_model); or what a reward "
        "model itself pays for, in features of its own, by pairs (--reward_model; --model is not needed).",
        "dpo",
        main=True,
    )
    top: int = option("Features to print.", 10, main=True)
    loss_type: list[str] = option("As in TRL's DPOConfig: sigmoid, ipo, hinge …", ["sigmoid"])
    beta: float = option("As in TRL's DPOConfig.", 0.1)
    label_smoothing: float = option("As in TRL's DPOConfig.", 0.0)
    max_length: int = option("Tokens at which prompt and answer are cut.", 1024)
    batch_size: int = option("Pairs at a time; no figure depends on it.", 8)
    part_size: int = option("Rows in a file of the audit.", 512)
    activations: bool = option(
        "Encode the answers, for disparity and activation attribution.",
        True,
        negative="Do not encode the answers: no disparity, no activation attribution.",
    )
    attention_sinks: bool = option(
        "Count features as active at attention sinks too: tokens of more than ten times the median norm of their answer's.",
        False,
    )
    on_bad_row: Literal["stop", "set_aside"] = option("What to do at a row that is no pair.", "stop")
    topic_column: str | None = option(
        "Column of the dataset that says what a prompt is about; default clusters of the prompts by the model's hidden states.",
        None,
    )
    seed: int = option("Of the random flips and splits of the statistics, and of sampling.", 0)
    labels: str | None = option(
        "Labels of features: JSON, JSON lines, CSV, a flags.yaml, or another audit or run record. See `label` for more.",
        None,
        metavar="FILE",
    )
    fail_on: list[str] | None = option(
        "Exit with code 1 if the effect size of a feature, by number or label, is above or below a limit with its whole 95 % interval: "
        '"sycophancy>0.1" "1423<-0.2". May be repeated.',
        None,
        metavar="RULE",
        text=True,
        repeatable=True,
    )


@dataclass
class AuditedModelArguments(ModelArguments):
    """The model."""

    model: str = option(
        "Directory of a Hugging Face model, or its name on the Hub.",
        "",
        usual=True,
        aliases=["--model_name_or_path"],
    )


@dataclass
class AuditedPreferences(PreferenceArguments):
    """The preference pairs."""

    max_rows: int | None = option("Use the first rows only: a first look.", None, main=True)


@dataclass
class AuditedDictionaryArguments(DictionaryArguments):
    """The dictionary."""

    dictionary: str = option(
        "A directory of sae-lens, Gemma Scope, Llama Scope, sparsify, dictionary_learning …, or a sae-lens release or a repository on "
        "the Hub (with --sae_id). auto: the best registered SAE of the model in the local cache, and where there is none, one trained on "
        "the data first; it says which and why. train: always train one. What was trained is kept beside the audit.",
        "auto",
        main=True,
        aliases=["--sae"],
    )


@dataclass
class LookaheadArguments:
    """The lookahead."""

    lookahead: str | None = option(
        "Held-out pairs to look ahead with, on whose answers the change on given text is predicted too, or a file of prompts. "
        "Default: prompts held out of the dataset.",
        None,
    )
    no_lookahead: bool = option(
        "Leave the lookahead out, which takes as long as an epoch of training, and longer where pairs are few.",
        False,
        main=True,
    )
    lookahead_prompts: int = option("Prompts held out of the dataset, at most a quarter of them.", 64)
    lookahead_pairs: int = option("Rows of the dataset, drawn at random, on which the step is taken.", 4096)
    lookahead_samples: int = option(
        "Answers to sample at each of these prompts; 0 leaves generations out, and needs --lookahead with pairs.",
        4,
    )
    max_new_tokens: int = option("Longest of those answers.", 64)
    learning_rate: float = option("Of the step.", 1e-6)
    train_batch_size: int = option("Pairs in the step.", 8)
    unroll_steps: float | None = option(
        "Also predict what a whole run of that many steps at the full learning rate does (half the steps of a linear "
        "schedule). Costs as many gradients as the run, or a pass over the data.",
        None,
    )
    unroll_segments: int | None = option(
        "Long steps that this run takes; default one in ten of its steps, at least four.", None
    )
    influence: str | None = option(
        "A file of flags: each example's part in the predicted change of those.", None
    )


@dataclass
class EvidenceArguments:
    """The evidence."""

    evidence: int = option(
        "Gather evidence for that many top features (contexts, vocabulary): evidence.md to read, evidence.json "
        "for the report.",
        0,
    )


OPTIONS = (
    AuditedModelArguments,
    AuditedPreferences,
    AuditedDictionaryArguments,
    AuditArguments,
    RewardArguments,
    LookaheadArguments,
    EvidenceArguments,
    OutputArguments,
)


def run(
    model_arguments: ModelArguments,
    data: PreferenceArguments,
    dictionary_arguments: DictionaryArguments,
    arguments: AuditArguments,
    reward: RewardArguments,
    ahead: LookaheadArguments,
    evidence: EvidenceArguments,
    output: OutputArguments,
) -> int:
    from accelerate import PartialState

    from ..audit.evidence import gather_evidence
    from ..audit.evidence_files import write_evidence
    from ..flags import FlagSet
    from ..labels.files import label_texts, load_labels
    from .fail_on import check_rules, exit_code, parse_rules

    known = label_texts(*filter(None, (arguments.labels, arguments.output_dir))) if arguments.fail_on else []
    rules = parse_rules(arguments.fail_on or [], known)
    if rules and (ahead.no_lookahead or arguments.objective == "reward_model" or not ahead.lookahead_samples):
        raise AuditError(
            "--fail_on compares effect sizes in generations, which this audit does not look ahead to."
        )
    made = make_audit(model_arguments, data, dictionary_arguments, arguments, reward, ahead, evidence)
    audit = made.audit
    if ahead.influence:
        audit.influence(FlagSet.load(ahead.influence).of(audit.dictionary))
    if PartialState().is_main_process:
        if arguments.labels:
            load_labels(arguments.labels, audit.dictionary).save(audit.directory)
        if evidence.evidence:
            features = [int(feature) for feature in audit.ranking()["feature"].head(evidence.evidence)]
            texts = {label.feature: label.text for label in audit.labels()}
            found = gather_evidence(
                audit, features, made.model, made.tokenizer, made.dictionary, labels=texts
            )
            write_evidence(audit.directory, found)
        findings = check_rules(rules, audit)
        show(audit, arguments.top, output, findings)
        return exit_code(findings)
    return 0


@dataclass
class MadeAudit:
    """An audit and what it was made of."""

    audit: Audit
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dictionary: FeatureDictionary


def make_audit(
    model_arguments: ModelArguments,
    data: PreferenceArguments,
    dictionary_arguments: DictionaryArguments,
    arguments: AuditArguments,
    reward: RewardArguments,
    ahead: LookaheadArguments,
    evidence: EvidenceArguments,
) -> MadeAudit:
    """Make the audit that the options describe, or go on with it where it is finished."""
    from trl import DPOConfig

    from ..audit.api import audit_preferences, audit_reward_model
    from ..models.sampling import Sampling

    _check(model_arguments, arguments, reward, ahead, evidence)
    output_dir = arguments.output_dir or default_directory(
        model_arguments.model or str(reward.reward_model), data.dataset
    )
    if arguments.objective == "reward_model":
        model, tokenizer = load_judge(str(reward.reward_model), model_arguments)
        dictionary = dictionary_of(dictionary_arguments, model, tokenizer, data, output_dir)
    elif dictionary_arguments.dictionary in (AUTO, TRAIN):
        model, tokenizer = model_arguments.load()
        dictionary = dictionary_of(dictionary_arguments, model, tokenizer, data, output_dir)
    else:
        dictionary, model, tokenizer = dictionary_arguments.load_with(model_arguments)
    source = data.source()
    make = partial(_in_free_directory, output_dir, is_given=arguments.output_dir is not None)
    common: dict[str, Any] = {
        "batch_size": arguments.batch_size,
        "part_size": arguments.part_size,
        "activations": arguments.activations,
        "attention_sinks": arguments.attention_sinks,
        "on_bad_row": arguments.on_bad_row,
        "topic_column": arguments.topic_column,
        "seed": arguments.seed,
        "options": options_of(
            model_arguments, data, dictionary_arguments, arguments, reward, ahead, evidence
        ),
    }
    dpo = DPOConfig(
        output_dir,
        loss_type=arguments.loss_type,
        beta=arguments.beta,
        label_smoothing=arguments.label_smoothing,
        max_length=arguments.max_length,
        learning_rate=ahead.learning_rate,
        per_device_train_batch_size=ahead.train_batch_size,
        bf16=False,
        report_to="none",
    )
    if arguments.objective == "reward_model":
        audit = make(
            partial(
                audit_reward_model,
                *(model, tokenizer, source, dictionary),
                max_length=arguments.max_length,
                **common,
            )
        )
        return MadeAudit(audit, model, tokenizer, dictionary)
    config: DPOConfig | GRPOConfig = dpo
    if arguments.objective == "policy_gradient":
        config = grpo_config(reward, output_dir, ahead.learning_rate, ahead.train_batch_size)
        sampling = Sampling(
            reward.num_generations, reward.max_completion_length, reward.temperature, arguments.seed
        )
        common |= {"reward": load_rewards(reward, model_arguments), "sampling": sampling}
    audit = make(
        partial(
            audit_preferences,
            *(model, tokenizer, source, dictionary, arguments.objective),
            args=config,
            lookahead=_lookahead(ahead, arguments.seed),
            **common,
        )
    )
    return MadeAudit(audit, model, tokenizer, dictionary)


def default_directory(model: str, dataset: str) -> str:
    """Where an audit goes by default: the same place for the same model and data, so that the same command goes on there."""
    names = (
        re.sub(r"\.(jsonl?|ndjson|csv|parquet)(\.gz)?$", "", Path(name).name) for name in (model, dataset)
    )
    names = (re.sub(r"[^\w.-]+", "-", name) for name in names)
    return str(Path("runs", "-".join(["audit", *names])))


def _in_free_directory(directory: str, make: Callable[..., Audit], *, is_given: bool) -> Audit:
    """Make an audit in the directory; in a numbered one where it was not asked for and has an audit of other data or options.

    Raises:
        DirectoryTakenError: it has, and was asked for, or several processes work on the audit.
    """
    from accelerate import PartialState

    asked = directory
    for number in itertools.count(2):
        try:
            return make(output_dir=directory)
        except DirectoryTakenError as error:
            if is_given or PartialState().num_processes > 1:
                raise
            directory = f"{asked}-{number}"
            taken = str(error).partition(";")[0]
            logger.warning("%s. Without --output_dir this audit goes to %s.", taken, directory)
    raise AssertionError("The numbers never end.")


def _lookahead(ahead: LookaheadArguments, seed: int) -> LookaheadConfig | None:
    from ..audit.lookahead.config import LookaheadConfig
    from ..models.sampling import Sampling

    if ahead.no_lookahead:
        return None
    samples = ahead.lookahead_samples
    return LookaheadConfig(
        ahead.lookahead,
        ahead.lookahead_prompts,
        ahead.lookahead_pairs,
        Sampling(samples, ahead.max_new_tokens, seed=seed) if samples else None,
        unroll_steps=ahead.unroll_steps,
        unroll_segments=ahead.unroll_segments,
    )


def _check(
    model: ModelArguments,
    arguments: AuditArguments,
    reward: RewardArguments,
    ahead: LookaheadArguments,
    evidence: EvidenceArguments,
) -> None:
    """Refuse options that this objective would not follow."""
    others: dict[str, Any] = {}
    if arguments.objective != "dpo":
        known = AuditArguments(arguments.output_dir)
        names = ["loss_type", "beta", "label_smoothing"]
        names += ["max_length"] * (arguments.objective == "policy_gradient")
        others = {name: (getattr(arguments, name), getattr(known, name)) for name in names}
    if arguments.objective == "reward_model":
        others |= {"lookahead": (ahead.lookahead, None), "influence": (ahead.influence, None)}
        others |= {"unroll_steps": (ahead.unroll_steps, None), "evidence": (evidence.evidence, 0)}
    check_objective(arguments.objective, model, reward, others)


def reopen_audit(directory: str) -> Audit:
    """The audit in a directory with its model at hand, to predict with: the command that made it, once more.

    Raises:
        AuditError: it was not made by the command; its model, dictionary or data are not where they were.
    """
    from ..io.manifest import read_manifest

    if "model" not in read_manifest(directory, "audit").get("config", {}):
        raise AuditError(f"The audit in {directory} was made in Python, and does not say where its model is.")
    words = ["--config", directory, "--output_dir", directory]
    *options, _ = parse_options("audit", DESCRIPTION, EXAMPLE, OPTIONS, words)
    return make_audit(*options).audit
