"""The audit before training: which features would this data, or this reward model, teach?"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.opener import DatasetLike
from ..data.preferences import PairCheck
from ..errors import AuditError
from ..models.ambient import own_modes
from ..models.rewards import Reward, Rewards
from ..models.sampling import Sampling
from ..models.tokenizers import Processing, text_tokenizer
from ..saes.compatibility import check_dictionary, check_whole
from ..saes.dictionary import FeatureDictionary
from .answers import rewarded_answers
from .duration import estimate_duration
from .gradients import RewardPass
from .lookahead.config import LookaheadConfig
from .lookahead.gradient import trainable
from .lookahead.optimizer_step import UpdateRule
from .lookahead.run import AuditLookahead, update_rule
from .objectives import PreferenceLoss
from .policy_gradient import (
    advantage_rule,
    averages_tokens,
    check_options,
    longest_sequence,
    reward_weights,
    sampling_of,
)
from .result import Audit
from .rewards import AnswerCheck, PolicyGradientLoss, RewardLoss
from .run import AuditConfig, AuditRun, RowCheck, context_length
from .topics import check_topic_column

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import DPOConfig, GRPOConfig

logger = logging.getLogger(__name__)

_LOOKAHEAD = LookaheadConfig()
_TRAIN_BATCH = 8  # answers in a step, where no arguments of a trainer say how many


@own_modes()
def audit_preferences(
    model: nn.Module,
    tokenizer: Processing,
    dataset: DatasetLike,
    dictionary: FeatureDictionary,
    objective: Literal["dpo", "policy_gradient"] = "dpo",
    *,
    reward: Reward | Sequence[Reward] | None = None,
    sampling: Sampling | None = None,
    reward_tokenizer: Processing | Sequence[Processing | None] | None = None,
    args: DPOConfig | GRPOConfig | None = None,
    ref_model: nn.Module | None = None,
    output_dir: str | Path | None = None,
    batch_size: int = 8,
    part_size: int = 512,
    activations: bool = True,
    attention_sinks: bool = False,
    on_bad_row: Literal["stop", "set_aside"] = "stop",
    lookahead: LookaheadConfig | DatasetLike | None = _LOOKAHEAD,
    topic_column: str | None = None,
    seed: int = 0,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Audit:
    """Ask a preference dataset which features it would teach, before training on it.

    A pass over the data: the gradient of each example's loss at the dictionary's hook point, and the features active in its
    answers. Then the lookahead: what an optimizer step on the data does to every feature in the model's own answers to prompts
    held out of the data. It takes the gradient of the parameters, samples answers, and differentiates their probabilities; on a
    few thousand pairs all together takes about as long as an epoch of training. Nothing of the model is changed, and it
    runs in its own type, whatever autocast or `torch.inference_mode` is around the call. Under
    `accelerate launch` or `torchrun` the processes share the work, and the result is the same.

    Args:
        model: the policy as it would enter training, a causal language model, with PEFT adapters or without.
        tokenizer: its tokenizer, or a processor that has it: the audit is of texts.
        dataset: pairs in any layout TRL reads, in memory, streamed, or the path of a file.
        dictionary: made with `load_dictionary` or `FeatureDictionary`.
        objective: "dpo", or "policy_gradient" for what a reward would teach (GRPO, RLOO, PPO at the first step):
            `-A_i · log π(answer_i)`, the advantage A_i being the reward less the mean over the prompt's answers, over their standard
            deviation, as GRPO computes it. Sides are then reinforced and suppressed, and an example is an answer.
        reward: for "policy_gradient": what GRPOTrainer takes as `reward_funcs`: a function, async or not, a sequence classification
            model, the name of either ("module:function", a directory, a model on the Hub), or several of them.
        reward_tokenizer: of a reward that is a model; by default from where the model was loaded, or the policy's.
        sampling: how answers are sampled: for "policy_gradient" those that are rewarded, where the dataset has prompts but no
            "completion"; for the lookahead those it looks at. By default four of at most 128 tokens (or half the context), or as
            the GRPOConfig says; and four of 64.
        args: the DPOConfig of the run to come: loss type, beta, max_length …, or for "policy_gradient" its GRPOConfig: reward_weights,
            scale_rewards, num_generations …; TRL's defaults if None.
        ref_model: the reference model; by default the policy itself, as in TRL at the first step, which costs nothing.
        output_dir: where the audit is written, part by part; begun again with the same arguments it goes on where
            it stopped. By default a temporary directory, gone with the `Audit`; keep it with `Audit.save`.
        batch_size: examples at a time; changes nothing but speed and memory.
        part_size: rows in a file of the audit.
        activations: also encode the answers, for disparity and activation attribution.
        attention_sinks: count tokens of more than ten times the median norm of their answer's in the activations too, on which
            no SAE is trained; they are left out otherwise, and the log says how many.
        on_bad_row: "stop" at a row that is no pair, or "set_aside".
        lookahead: how to look ahead to generations; by default 64 prompts are held out, and the step is taken on at most
            4,096 of the pairs. Held-out pairs serve as a probe, on whose answers the change on given text is predicted too.
            None leaves the lookahead out.
        topic_column: a column of the dataset that says what a prompt is about, for `Audit.topics`; by default prompts are sorted by
            what the model makes of them.
        seed: of all that is drawn at random, but for the sampling.
        progress: show a bar.
        options: what the manifest keeps as its `config`, to make the audit again; by default these arguments, as far as
            they can be written down.

    Raises:
        AuditError: columns missing; a bad row, by its number; a dictionary that does not fit the model; a loss
            without examples of its own; a loss that is not finite; an `output_dir` of another audit.

    Example:

    ```python
    audit = audit_preferences(model, tokenizer, dataset, load_dictionary("path/to/sae"))
    audit.features().head(10)
    audit.examples([1423]).sort_values("attribution")
    ```
    """
    config = _config(batch_size, part_size, activations, attention_sinks, on_bad_row, seed, dataset, options)
    if lookahead is None and sampling is not None and objective == "dpo":
        raise AuditError(
            "sampling= is for a lookahead, and lookahead=None leaves that out; omit one of them."
        )
    if output_dir is not None:  # a reward may change the process's directory
        output_dir = Path(output_dir).absolute()
    ahead = _lookahead_config(lookahead, sampling, objective)
    if ahead is not None and not ahead.is_default:
        trainable(model)
    reader = _reader(tokenizer, model, dictionary)
    if objective == "policy_gradient":
        if reward is None:
            raise AuditError(
                "objective 'policy_gradient' needs a reward; pass reward= with a function or a model."
            )
        rewards = Rewards(
            reward, reward_tokenizer, reward_weights(args), batch_size=batch_size, fallback=reader
        )
        return _audit_rewards(
            model,
            reader,
            dataset,
            dictionary,
            rewards,
            sampling,
            args,
            ahead,
            config,
            output_dir,
            topic_column,
            progress,
        )
    if reward is not None or reward_tokenizer is not None:
        raise AuditError("A reward is for objective='policy_gradient'; pass that, or omit the reward.")
    if objective != "dpo":
        raise AuditError(f"objective is {objective!r}; choose 'dpo' or 'policy_gradient'.")
    loss = PreferenceLoss(reader, args, tokenizer)
    run = AuditRun(
        model,
        dictionary,
        loss,
        reference=ref_model,
        config=config,
        progress=progress,
        tokenizer=reader,
    )
    make_rule = lambda: _usual_rule(loss.trainer.args)  # noqa: E731
    check_topic_column(dataset, topic_column)
    audit = _audit(run, dataset, PairCheck(), output_dir, ahead, reader, make_rule)
    audit.find_topics(dataset, topic_column, reader)
    audit.keep_vocabulary(model, reader, dictionary)
    return audit


def _audit_rewards(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetLike,
    dictionary: FeatureDictionary,
    rewards: Rewards,
    sampling: Sampling | None,
    args: TrainingArguments | None,
    ahead: LookaheadConfig | None,
    config: AuditConfig,
    output_dir: str | Path | None,
    topic_column: str | None,
    progress: bool,
) -> Audit:
    check_options(args)
    check_topic_column(dataset, topic_column)
    context = context_length(model)
    answered = rewarded_answers(
        model,
        tokenizer,
        dataset,
        rewards,
        sampling or sampling_of(args, context),
        rule=advantage_rule(args),
        context=context,
        on_bad_row=config.on_bad_row,
        progress=progress,
    )
    loss = PolicyGradientLoss(
        tokenizer,
        longest_sequence(args),
        mean_over_tokens=averages_tokens(args),
        about=answered.about,
    )
    run = AuditRun(
        model, dictionary, loss, reference=None, config=config, progress=progress, tokenizer=tokenizer
    )
    audit = _audit(
        run,
        answered.rows,
        AnswerCheck(answered.problems),
        output_dir,
        ahead if answered.teaches else None,
        tokenizer,
        lambda: _usual_rule(args),
    )
    audit.keep_answers(answered.rows)
    audit.find_topics(answered.rows, topic_column, tokenizer)
    audit.keep_vocabulary(model, tokenizer, dictionary)
    return audit


@own_modes()
def audit_reward_model(
    reward_model: nn.Module,
    tokenizer: Processing,
    dataset: DatasetLike,
    dictionary: FeatureDictionary,
    *,
    max_length: int | None = 1024,
    output_dir: str | Path | None = None,
    batch_size: int = 8,
    part_size: int = 512,
    activations: bool = True,
    attention_sinks: bool = False,
    on_bad_row: Literal["stop", "set_aside"] = "stop",
    topic_column: str | None = None,
    seed: int = 0,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Audit:
    """Ask a reward model what it pays for, in features of its own backbone.

    What is differentiated is the mean reward of the dataset's answers, chosen and rejected alike: attribution is how
    much the reward rises with the feature, `⟨∂r/∂h, d_f⟩` summed over tokens, activation_attribution how much of the
    reward the feature's activations make up to first order. The sides show the two kinds of answers; beside them
    disparity shows what the human labels go with. `log_prob` in `Audit.examples` is the reward.

    Args:
        reward_model: a sequence-classification model with one output.
        tokenizer: its tokenizer, or a processor that has it.
        dataset: pairs, as for `audit_preferences`, whose other arguments apply.
        dictionary: of the reward model's backbone, or of the model it was made from, if it still fits.
        max_length: tokens at which prompt and answer are cut; None for no cut.

    Raises:
        AuditError: a model with another number of outputs; otherwise as `audit_preferences`.
    """
    reader = _reader(tokenizer, reward_model, dictionary, classifies=True)
    run = AuditRun(
        reward_model,
        dictionary,
        RewardLoss(reader, reward_model, max_length, tokenizer),
        reference=None,
        config=_config(
            batch_size, part_size, activations, attention_sinks, on_bad_row, seed, dataset, options
        ),
        progress=progress,
        tokenizer=reader,
        pass_type=RewardPass,
    )
    check_topic_column(dataset, topic_column)
    audit = run.over(dataset, PairCheck(), output_dir)
    audit.find_topics(dataset, topic_column, reader)
    return audit


def _reader(
    tokenizer: Processing, model: nn.Module, dictionary: FeatureDictionary, *, classifies: bool = False
) -> PreTrainedTokenizerBase:
    check_whole(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise AuditError(
            f"This {type(model).__name__} was made in torch.inference_mode, and no gradient goes through its parameters; load it outside "
            "of that."
        )
    return text_tokenizer(tokenizer, check_dictionary(dictionary, model).decoder, classifies=classifies)


def _lookahead_config(
    lookahead: LookaheadConfig | DatasetLike | None, sampling: Sampling | None, objective: str
) -> LookaheadConfig | None:
    """With a reward, `sampling` is first of all how the rewarded answers are sampled: a configuration has its own."""
    if lookahead is None:
        return None
    is_config = isinstance(lookahead, LookaheadConfig)
    config = lookahead if isinstance(lookahead, LookaheadConfig) else LookaheadConfig(lookahead)
    if sampling is None or (objective == "policy_gradient" and is_config and lookahead is not _LOOKAHEAD):
        return config
    return replace(
        config, sampling=replace(sampling, temperature=1.0) if objective == "policy_gradient" else sampling
    )


def _audit(
    run: AuditRun,
    dataset: DatasetLike,
    check: RowCheck,
    output_dir: str | Path | None,
    config: LookaheadConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    usual: Callable[[], UpdateRule],
) -> Audit:
    """The audit with its lookahead. One that nobody asked for in particular and that cannot be had is a warning."""
    if config is None:
        return run.over(dataset, check, output_dir)
    try:
        rule = update_rule(config.optimizer, run.model, usual)
        lookahead = AuditLookahead(run, dataset, check, config, rule, tokenizer)
    except AuditError as error:
        if not config.is_default:
            raise
        logger.warning("This audit has no lookahead to generations. %s", error)
        return run.over(dataset, check, output_dir)
    if run.progress and PartialState().is_main_process and not run.is_finished(output_dir):
        tqdm.write(str(estimate_duration(run, lookahead)), file=sys.stderr)
    audit = run.over(dataset, check, output_dir, lookahead.take_step)
    audit.attach_lookahead(lookahead)
    return audit


def _usual_rule(args: TrainingArguments | None) -> UpdateRule:
    return UpdateRule(batch_size=_TRAIN_BATCH) if args is None else UpdateRule.from_args(args)


def _config(
    batch_size: int,
    part_size: int,
    activations: bool,
    attention_sinks: bool,
    on_bad_row: Literal["stop", "set_aside"],
    seed: int,
    dataset: DatasetLike,
    options: Mapping[str, Any] | None = None,
) -> AuditConfig:
    for name, value in (("batch_size", batch_size), ("part_size", part_size)):
        if value < 1:
            raise AuditError(f"{name} is {value}; it must be at least 1.")
    if on_bad_row not in ("stop", "set_aside"):
        raise AuditError(f"on_bad_row is {on_bad_row!r}; choose 'stop' or 'set_aside'.")
    if options is None:
        options = {
            "dataset": str(dataset) if isinstance(dataset, (str, Path)) else None,
            "batch_size": batch_size,
            "part_size": part_size,
            "activations": activations,
            "attention_sinks": attention_sinks,
            "on_bad_row": on_bad_row,
            "seed": seed,
        }
    return AuditConfig(batch_size, part_size, activations, on_bad_row, seed, options, attention_sinks)
