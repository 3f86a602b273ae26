"""The audit before training: which features would this data, or this reward model, teach?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from .audit_pass import RewardPass
from .audit_result import Audit
from .audit_run import AuditRun, RunSettings
from .dictionary import FeatureDictionary
from .errors import AuditError
from .objectives import PreferenceLoss
from .preferences import PairCheck, Source
from .rewards import AnswerCheck, PolicyGradientLoss, Reward, RewardLoss, rewarded_answers
from .sampling import Sampling
from .update_rule import UpdateRule

if TYPE_CHECKING:
    from trl import DPOConfig


def audit_preferences(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Source,
    dictionary: FeatureDictionary,
    objective: str = "dpo",
    *,
    reward: Reward | None = None,
    sampling: Sampling | None = None,
    args: DPOConfig | None = None,
    ref_model: nn.Module | None = None,
    output_dir: str | Path | None = None,
    batch_size: int = 8,
    part_size: int = 512,
    activations: bool = True,
    on_bad_row: str = "stop",
    lookahead: Source | None = None,
    rehearse_steps: float | None = None,
    rehearse_parts: int | None = None,
    optimizer: UpdateRule | torch.optim.Optimizer | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Ask a preference dataset which features it would teach, before training on it.

    One pass over the data: the gradient of each example's loss at the dictionary's hook point, and the features
    active in its answers. Nothing of the model is changed. Under `accelerate launch` or `torchrun` the processes
    share the work, and the result is the same.

    Args:
        model: the policy as it would enter training, a causal language model, with PEFT adapters or without.
        tokenizer: its tokenizer.
        dataset: pairs in any layout TRL reads, in memory, streamed, or the path of a file.
        dictionary: made with `load_dictionary` or `FeatureDictionary`.
        objective: "dpo", or "policy_gradient" for what a reward would teach (GRPO, RLOO, PPO at the first step):
            `-A_i · log π(answer_i)`, the advantage A_i being the reward less the mean over the prompt's answers.
        reward: for "policy_gradient": `reward(prompts=…, completions=…, **columns)` → one number each, as TRL's
            trainers call it, or a sequence-classification model. Sides are then reinforced and suppressed.
        sampling: for "policy_gradient", how to sample answers where the dataset has prompts but no "completion". For
            "dpo" with a lookahead: also sample answers at the probe's prompts, and predict how a step changes each
            feature's mean activation on the answers the model gives: what it would write, not how it reads.
        args: the DPOConfig of the run to come: loss type, beta, max_length …; TRL's defaults if None.
        ref_model: the reference model; by default the policy itself, as in TRL at the first step, which costs nothing.
        output_dir: where the audit is written, part by part; begun again with the same arguments it goes on where
            it stopped. By default a temporary directory, gone with the `Audit`; keep it with `Audit.save`.
        batch_size: examples at a time; changes nothing but speed and memory.
        part_size: rows in a file of the audit.
        activations: also encode the answers, for disparity and activation attribution.
        on_bad_row: "stop" at a row that is no pair, or "set_aside".
        lookahead: held-out pairs as a probe: also predict how one optimizer step on the whole dataset changes each
            feature's mean activation on their answers. A second, dearer pass: parameter gradients of the dataset.
        rehearse_steps: with a lookahead: also look as far as the end of a run of that many steps at the full learning rate
            (of one whose rate falls linearly to 0, half its steps), see `Rehearsal`. A third, dearer pass.
        rehearse_parts: into how many long steps it takes these together, by default at most ten in one.
        optimizer: whose step; an `UpdateRule`, or a running `torch.optim.AdamW` or `SGD` over the model's parameters;
            by default the usual step of a trainer with `args`.
        seed: of the random flips and splits of the statistics.
        progress: show a bar.

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
    settings = _settings(batch_size, part_size, activations, on_bad_row, seed)
    if lookahead is not None and PartialState().num_processes > 1:
        raise AuditError(
            "The lookahead runs in one process. Leave it out of this run, which the processes share; then run the same audit "
            "in one process with it: what is there already is not computed again."
        )
    if objective == "policy_gradient":
        if reward is None:
            raise AuditError(
                "objective 'policy_gradient' needs a reward; pass reward= with a function or a model."
            )
        if lookahead is not None:
            raise AuditError("The lookahead is for objective 'dpo'; leave lookahead= out.")
        policy_gradient = PolicyGradientLoss(tokenizer, args.max_length if args is not None else None)
        answers = rewarded_answers(model, tokenizer, dataset, reward, sampling, batch_size)
        run = AuditRun(
            model, dictionary, policy_gradient, reference=None, settings=settings, progress=progress
        )
        return run.over(answers, AnswerCheck(), output_dir)
    if objective != "dpo":
        raise AuditError(f"objective is {objective!r}; choose 'dpo' or 'policy_gradient'.")
    loss = PreferenceLoss(tokenizer, args)
    run = AuditRun(model, dictionary, loss, reference=ref_model, settings=settings, progress=progress)
    audit = run.over(dataset, PairCheck(), output_dir)
    for name, option in (
        ("sampling", sampling),
        ("rehearse_steps", rehearse_steps),
        ("rehearse_parts", rehearse_parts),
    ):
        if lookahead is None and option is not None:
            raise AuditError(
                f"{name}= is for a lookahead; pass lookahead= with held-out pairs, or leave it out."
            )
    if rehearse_steps is None and rehearse_parts is not None:
        raise AuditError("rehearse_parts= is for a rehearsal; pass rehearse_steps= as well, or leave it out.")
    if lookahead is not None:
        rule = _update_rule(optimizer, model, loss.trainer.args)
        rehearsed = None if rehearse_steps is None else (rehearse_steps, rehearse_parts)
        run.look_ahead(audit, dataset, lookahead, rule, sampling, rehearsed, tokenizer)
    return audit


def audit_reward_model(
    reward_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Source,
    dictionary: FeatureDictionary,
    *,
    max_length: int | None = 1024,
    output_dir: str | Path | None = None,
    batch_size: int = 8,
    part_size: int = 512,
    activations: bool = True,
    on_bad_row: str = "stop",
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Ask a reward model what it pays for, in features of its own backbone.

    What is differentiated is the mean reward of the dataset's answers, chosen and rejected alike: attribution is how
    much the reward rises with the feature, `⟨∂r/∂h, d_f⟩` summed over tokens, activation_attribution how much of the
    reward the feature's activations make up to first order. The sides show the two kinds of answers; beside them
    disparity shows what the human labels go with. `log_prob` in `Audit.examples` is the reward.

    Args:
        reward_model: a sequence-classification model with one output.
        tokenizer: its tokenizer.
        dataset: pairs, as for `audit_preferences`, whose other arguments apply.
        dictionary: of the reward model's backbone, or of the model it was made from, if it still fits.
        max_length: tokens at which prompt and answer are cut; None for no cut.

    Raises:
        AuditError: a model with another number of outputs or no pad token; otherwise as `audit_preferences`.
    """
    run = AuditRun(
        reward_model,
        dictionary,
        RewardLoss(tokenizer, reward_model, max_length),
        reference=None,
        settings=_settings(batch_size, part_size, activations, on_bad_row, seed),
        progress=progress,
        pass_type=RewardPass,
    )
    return run.over(dataset, PairCheck(), output_dir)


def _update_rule(
    optimizer: UpdateRule | torch.optim.Optimizer | None, model: nn.Module, args: DPOConfig
) -> UpdateRule:
    if isinstance(optimizer, UpdateRule):
        return optimizer
    rule = UpdateRule.from_args(args)
    if optimizer is None:
        return rule
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return UpdateRule.from_optimizer(optimizer, trained, rule.max_grad_norm)


def _settings(batch_size: int, part_size: int, activations: bool, on_bad_row: str, seed: int) -> RunSettings:
    for name, value in (("batch_size", batch_size), ("part_size", part_size)):
        if value < 1:
            raise AuditError(f"{name} is {value}; it must be at least 1.")
    if on_bad_row not in ("stop", "set_aside"):
        raise AuditError(f"on_bad_row is {on_bad_row!r}; choose 'stop' or 'set_aside'.")
    return RunSettings(batch_size, part_size, activations, on_bad_row, seed)
