"""Reward models and functions as they come: what they must have, what they are called, and how to ask them."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import AuditError
from .residual_stream import evaluation_mode
from .tokenized import check_tokenizer


def without_adapters(reward: Any) -> Any:
    """The model that a PEFT model has put its adapters into, where they stay at work; anything else as it is.

    Raises:
        AuditError: adapters that are not in the model but before its input.
    """
    if not isinstance(reward, PeftModel):
        return reward
    if reward.active_peft_config.is_prompt_learning:
        raise AuditError(
            f"The reward model's adapter is {reward.active_peft_config.peft_type.value}, which stands before the input "
            "where PPO does not pass; use LoRA or another adapter within the model, or pass a function that returns its "
            "rewards."
        )
    return reward.get_base_model()


def check_reward_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a reward model that PPO cannot use.

    Raises:
        AuditError: without backbone or `score`; of several labels; with another model's tokenizer.
    """
    prefix = str(model.base_model_prefix) if hasattr(model, "base_model_prefix") else ""
    if not prefix or not hasattr(model, prefix) or not hasattr(model, "score"):
        missing = "no head called `score`" if prefix and hasattr(model, prefix) else "no backbone"
        raise AuditError(
            f"Reward model {type(model).__name__} has {missing}, which PPO needs; load it with "
            "AutoModelForSequenceClassification.from_pretrained(…, num_labels=1), or pass a function that returns its "
            "rewards."
        )
    if isinstance(model, PreTrainedModel):
        if model.config.num_labels != 1:
            raise AuditError(
                f"Reward model {type(model).__name__} has {model.config.num_labels} labels, so its reward is not one "
                "number; load it with num_labels=1, or pass a function that combines them."
            )
        if tokenizer is not None:
            check_tokenizer(tokenizer, model)


def model_as_function(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> Callable[..., list[float]]:
    """A sequence classification model as a reward function of texts, tokenized as TRL does for its reward models.

    Raises:
        AuditError: no tokenizer; more than one label.
    """
    if tokenizer is None:
        raise AuditError(
            f"The reward is the model {type(model).__name__}; pass its tokenizer as reward_tokenizer=."
        )
    if isinstance(model, PreTrainedModel) and model.config.num_labels != 1:
        raise AuditError(
            f"Reward model {name_of(model)!r} has {model.config.num_labels} labels, so its reward is not one number; "
            "load it with num_labels=1, or pass a function that combines them."
        )

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        texts = [joined_text(*pair, tokenizer) for pair in zip(prompts, completions, strict=True)]
        batch = tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        device = next(model.parameters()).device
        with torch.inference_mode(), evaluation_mode(model):
            logits = model(**{name: values.to(device) for name, values in batch.items()}).logits
        return logits[:, 0].float().tolist()

    return reward


def awaited(value: Any) -> Any:
    """The result of what may be awaitable; outside any event loop."""

    async def wait() -> Any:
        return await value

    return asyncio.run(wait()) if inspect.isawaitable(value) else value


def joined_text(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt and completion as the one text TRL gives a reward model."""
    if isinstance(prompt, str):
        return prompt + completion
    return str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))


def name_of(reward: Any) -> str:
    """What TRL would call the reward in its logs."""
    if isinstance(reward, PreTrainedModel):
        return reward.config.name_or_path.split("/")[-1] or type(reward).__name__
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward.__name__ if hasattr(reward, "__name__") else type(reward).__name__
