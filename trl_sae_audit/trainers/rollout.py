"""What TRL knows while it asks for a reward, and does not pass on: who asks, and where responses begin.

PPO hands a reward model token ids without the length of the prompt, GRPO, RLOO and OnlineDPO hand a module prompt
and completion as one text. Both are local variables of the caller, which is where they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn
from transformers import Trainer

from ..errors import AuditError
from .call_stack import calling_frames, trainer_frames

_REWARDING = {"_calculate_rewards", "_calculate_rewards_from_functions"}


@dataclass(frozen=True)
class TokenRollout:
    """PPO asks: the first `context_length` tokens of every row are the (left-padded) prompt."""

    context_length: int
    trainer: Trainer | None
    learning: bool


@dataclass(frozen=True)
class TextRollout:
    """GRPO, RLOO or OnlineDPO asks: the texts whose rewards it wants, in the order of the rows.

    `keywords` is what it passes to reward functions besides the texts: token ids, columns of the dataset, its state.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    keywords: Mapping[str, Any]
    trainer: Trainer
    learning: bool


def token_rollout() -> TokenRollout:
    """PPO's call of `get_reward`; `learning` if it is for training, not for a table of samples.

    Raises:
        AuditError: called from elsewhere.
    """
    for frame in calling_frames():
        if frame.f_code.co_name == "get_reward" and "context_length" in frame.f_locals:
            trainer, method = next(trainer_frames(), (None, None))
            learning = method is not None and method.f_code.co_name == "train"
            return TokenRollout(int(frame.f_locals["context_length"]), trainer, learning)
    raise AuditError(
        "The shaped reward model cannot tell where responses begin: PPO's get_reward is not calling it. Call "
        "get_reward(model, query_responses, pad_token_id, context_length) of TRL, or model.rewards(prompts, responses)."
    )


def text_rollout() -> TextRollout:
    """The call of the trainer that wants texts judged.

    Raises:
        AuditError: called from elsewhere.
    """
    for trainer, frame in trainer_frames():
        if frame.f_code.co_name in _REWARDING:
            known = frame.f_locals
            keywords = {"completion_ids": known["completion_ids_list"], **known["reward_kwargs"]}
            return TextRollout(
                known["prompts"], known["completions"], keywords, trainer, trainer.model.training
            )
    raise AuditError(
        "The shaped reward model cannot tell prompt from response in its input_ids: no GRPO, RLOO or OnlineDPO trainer is "
        "calling it. Call model.rewards(prompts, responses)."
    )


def trainer_of_function(keywords: Mapping[str, Any]) -> Trainer | None:
    """The trainer that calls a reward function; None if someone else does."""
    log_metric = keywords.get("log_metric")
    if isinstance(log_metric, MethodType) and isinstance(log_metric.__self__, Trainer):
        return log_metric.__self__
    return next((trainer for trainer, _ in trainer_frames()), None)


def template_options(trainer: Trainer) -> Mapping[str, Any]:
    """What GRPO and RLOO render a reward model's conversations with besides the messages; nothing in other trainers."""
    return vars(trainer).get("chat_template_kwargs") or {}


def is_trained(model: nn.Module, trainer: Trainer) -> bool:
    """Whether `model` is (part of, or around) the very model that the trainer trains."""
    parts = {id(part) for part in model.modules() if any(True for _ in part.parameters(recurse=False))}
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return any(id(part) in parts for part in policy.modules())
