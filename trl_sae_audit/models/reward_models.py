"""Reward models: what they must have, how they are loaded, and how TRL's trainers ask them about texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import AuditError
from .batches import batched
from .residual_stream import evaluation_mode
from .tokenizers import Processing, text_tokenizer

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
"""What `from_pretrained` raises at names and files that it cannot read."""


def strip_adapters(reward: Any) -> Any:
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


def check_reward_model(model: nn.Module, tokenizer: Processing | None) -> None:
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
        check_one_label(model)
        if tokenizer is not None:
            text_tokenizer(tokenizer, model, classifies=True)


def check_one_label(model: nn.Module) -> None:
    """Refuse a classifier of several labels.

    Raises:
        AuditError: if it is one.
    """
    classifier = find_classifier(model)
    if classifier is not None and classifier.config.num_labels != 1:
        raise AuditError(
            f"Reward model {model_id(classifier) or type(classifier).__name__} has {classifier.config.num_labels} labels, so its "
            "reward is not one number; load it with num_labels=1, or pass a function that combines them."
        )


def find_classifier(model: nn.Module) -> PreTrainedModel | None:
    """The transformers model in a reward model, which may be wrapped by PEFT or compiled; None where there is none."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


def model_id(model: PreTrainedModel) -> str:
    """Where a model was loaded from: a directory or a name on the Hub; "" for one that was made in memory."""
    return model.config.name_or_path or ""


def load_reward_model(name: str, **options: Any) -> PreTrainedModel:
    """A sequence classification model of one label, as TRL's trainers load a reward that is named by a string.

    Args:
        name: directory, or name on the Hub.
        options: of `from_pretrained`, such as `dtype=`.

    Raises:
        AuditError: it cannot be loaded, or its files lack some of its weights, the head's say.
    """
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, output_loading_info=True, **options
        )
    except UNREADABLE as error:
        raise AuditError(
            f"The reward model {name!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise AuditError(
            f"The files of the reward model {name!r} lack {len(missing)} of its weights, such as {missing[0]!r}, which would be "
            "random: give a sequence classification model of one label, as TRL's RewardTrainer saves it."
        )
    return model.eval()


def load_reward_tokenizer(model: nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer from where the model was loaded; None for a model that was made in memory.

    Raises:
        AuditError: there is none.
    """
    classifier = find_classifier(model)
    if classifier is None or not model_id(classifier):
        return None
    try:
        return AutoTokenizer.from_pretrained(model_id(classifier))
    except UNREADABLE as error:
        raise AuditError(
            f"The tokenizer of reward model {model_id(classifier)!r} cannot be loaded ({' '.join(str(error).split())}); pass it as "
            "reward_tokenizer=."
        ) from error


TemplateOptions = Callable[[], Mapping[str, Any]]
"""What conversations are rendered with besides the messages, as it is at the time: a trainer's `chat_template_kwargs`."""


def model_as_function(
    model: nn.Module,
    tokenizer: Processing | None,
    batch_size: int | None = None,
    template: TemplateOptions = dict,
) -> Callable[..., list[float]]:
    """A sequence classification model as a reward function: texts tokenized and padded as TRL does for its reward models.

    Args:
        model: whose first logit is the reward.
        tokenizer: its own; None to load it from where the model was loaded.
        batch_size: texts in one forward pass; None for all of them, as in TRL.
        template: gives the options of the chat template at each call.

    Raises:
        AuditError: no tokenizer; one without any token to pad with; more than one label.
    """
    from trl import apply_chat_template, is_conversational

    given = tokenizer if tokenizer is not None else load_reward_tokenizer(model)
    if given is None:
        raise AuditError(
            f"The reward is the model {type(model).__name__}; pass its tokenizer as reward_tokenizer=."
        )
    reader = text_tokenizer(given, find_classifier(model), classifies=True)
    check_one_label(model)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        both = list(zip(prompts, completions, strict=True))
        if is_conversational({"prompt": prompts[0]}):
            options = template()
            texts = [apply_chat_template({"messages": p + c}, reader, **options)["text"] for p, c in both]
        else:
            texts = [p + c for p, c in both]
        with torch.inference_mode(), evaluation_mode(model), _padding_as_in_trl(model, reader):
            parts = [_rewards_of(model, reader, some) for some in batched(texts, batch_size or len(texts))]
        return torch.cat(parts).tolist()

    return reward


def _rewards_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    batch = tokenizer(
        text=list(texts), return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    device = next(model.parameters()).device
    return model(**{name: values.to(device) for name, values in batch.items()}).logits[:, 0].float().cpu()


@contextmanager
def _padding_as_in_trl(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """A tokenizer without a padding token pads with the end of sequence, and the model takes its padding for padding.

    The model reads its reward at the last token that is not its config's `pad_token_id`. TRL changes both for good.
    """
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise AuditError(
            "The reward model's tokenizer has neither a padding nor an end-of-sequence token, so its texts cannot be batched; set "
            "tokenizer.pad_token."
        )
    token = tokenizer.pad_token
    if token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        with padded_with(model, tokenizer.pad_token_id):
            yield
    finally:
        if token is None:
            tokenizer.pad_token = None


@contextmanager
def padded_with(model: nn.Module, token: int | None) -> Iterator[None]:
    """Let a classifier take `token` for padding, before which it finds a row's last token, whatever its configuration says."""
    classifier = find_classifier(model)
    if classifier is None:
        yield
        return
    config = classifier.config.get_text_config()
    known, config.pad_token_id = config.pad_token_id, token
    try:
        yield
    finally:
        config.pad_token_id = known
