"""Where a trainer's forward shows the values its loss is computed from: log-probabilities of response tokens, or rewards.

Their own gradient says how much the loss wants of each response. TRL's newest trainers get log-probabilities from the model;
OnlineDPO and PPO compute them from logits, and a reward model gives one number a row. Elsewhere nothing is found, and the
gradient at the last hidden state has to do.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, Trainer

from ..attribution.responses import Responses
from ..attribution.selection import after_shared_prompt
from .call_stack import calling_frames
from .kinds import policy_of, trainer_kind
from .method_wraps import MethodWraps

Report = Callable[[Responses], None]


def watch_responses(trainer: Trainer, wraps: MethodWraps, report: Report) -> list[RemovableHandle]:
    """Call `report` after every forward under autograd that shows the values the loss is computed from.

    Args:
        trainer: about to train.
        wraps: to which methods of the trainer that have to be wrapped are added.
        report: called before the backward pass.

    Returns:
        The hooks put on the model.
    """
    kind = trainer_kind(trainer)
    if kind == "PPOTrainer":
        module = sys.modules[_class_of(trainer, kind).__module__]
        wraps.wrap(module, "selective_log_softmax", functools.partial(_ppo_log_probs, report))
        return []
    if kind == "OnlineDPOTrainer":
        wraps.wrap(trainer, "_forward", functools.partial(_online_log_probs, report))
        return []
    model = policy_of(trainer)
    if kind == "RewardTrainer":
        hook = functools.partial(_on_rewards, report)
        return [_reward_model(model).register_forward_hook(hook, with_kwargs=True)]
    causal = next(
        (
            part
            for part in model.modules()
            if isinstance(part, PreTrainedModel) and part.get_output_embeddings()
        ),
        None,
    )
    return [] if causal is None else [causal.register_forward_hook(functools.partial(_on_log_probs, report))]


def temperature_of(trainer: Trainer) -> float:
    """What the trainer divides the logits by before its loss."""
    return float(trainer.temperature) if trainer_kind(trainer) in ("GRPOTrainer", "RLOOTrainer") else 1.0


def _class_of(trainer: Trainer, kind: str) -> type:
    return next(cls for cls in type(trainer).__mro__ if cls.__name__ == kind)


def _reward_model(model: nn.Module) -> nn.Module:
    return next(part for part in model.modules() if isinstance(part, PreTrainedModel))


@torch.compiler.disable
def _on_log_probs(report: Report, module: nn.Module, args: Any, output: Any) -> None:
    """TRL's fused head: `model(..., labels=labels, fused_lm_head=True)`. Its log-probabilities are 0 where no label is."""
    if (
        not torch.is_grad_enabled()
        or not isinstance(output, dict)
        or not {"log_probs", "label_mask"} <= set(output)
    ):
        return
    values = output["log_probs"]
    if values.requires_grad:
        others = [output[name] for name in ("entropy",) if name in output]
        report(Responses(values, output["label_mask"], tuple(each for each in others if each.requires_grad)))


@torch.compiler.disable
def _on_rewards(report: Report, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    rewards = output.logits
    if torch.is_grad_enabled() and rewards.requires_grad and rewards.numel() == len(rewards):
        counted = after_shared_prompt(kwargs["input_ids"], kwargs["attention_mask"])
        report(Responses(rewards, counted))


def _online_log_probs(
    report: Report,
    original: Callable[..., Tensor],
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    values = original(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *args, **kwargs)
    if torch.is_grad_enabled() and values.requires_grad:
        report(Responses(values, completion_mask.bool()))
    return values


def _ppo_log_probs(
    report: Report, original: Callable[..., Tensor], logits: Tensor, index: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A function of PPO's module, which its one long `train` calls; what is padding is a local variable there."""
    values = original(logits, index, *args, **kwargs)
    if torch.is_grad_enabled() and values.requires_grad:
        train = next(frame.f_locals for frame in calling_frames() if "micro_batch_inds" in frame.f_locals)
        report(Responses(values, ~train["padding_mask"][train["micro_batch_inds"]]))
    return values
