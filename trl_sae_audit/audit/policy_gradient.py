"""What a GRPOConfig says of an audit of a reward."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from trl import DPOConfig, GRPOConfig

from ..errors import AuditError
from ..models.sampling import Sampling
from .advantages import AdvantageRule

if TYPE_CHECKING:
    from transformers import TrainingArguments

_PLAIN = (
    "top_p", "top_k", "min_p", "repetition_penalty", "mask_truncated_completions", "top_entropy_quantile", "entropy_coef",
    "chat_template_kwargs",
)  # fmt: skip
"""Options that an audit takes at their defaults: answers are sampled from the model's own distribution, to prompts as the chat template has them, and all tokens count."""
_SUMMED = ("dapo", "bnpo", "dr_grpo", "cispo", "luspo")
_AVERAGED = ("grpo", "sapo")
"""Loss types whose first step is that of `A·log π` of all tokens, or of its mean over each answer's."""


def check_options(args: TrainingArguments | None) -> None:
    """Refuse a configuration whose gradient an audit would not compute.

    Raises:
        AuditError: naming the option.
    """
    if not isinstance(args, GRPOConfig):
        return
    defaults = {field.name: field.default for field in fields(GRPOConfig)}
    for name in _PLAIN:
        if getattr(args, name) != defaults[name]:
            raise AuditError(
                f"{name} is {getattr(args, name)!r}; an audit samples from the model's own distribution and counts every token: leave "
                "it out of the audit's args."
            )
    if args.loss_type not in (*_SUMMED, *_AVERAGED):
        raise AuditError(
            f"loss_type is {args.loss_type!r}; an audit of a reward knows {', '.join((*_SUMMED, *_AVERAGED))}."
        )


def averages_tokens(args: TrainingArguments | None) -> bool:
    """Whether the loss divides by each answer's length."""
    return isinstance(args, GRPOConfig) and args.loss_type in _AVERAGED


def advantage_rule(args: TrainingArguments | None) -> AdvantageRule:
    """How rewards become advantages; as by default without a GRPOConfig."""
    if not isinstance(args, GRPOConfig):
        return AdvantageRule()
    scale: Any = args.scale_rewards
    words = {True: "group", False: "none", "True": "group", "False": "none"}
    return AdvantageRule(words.get(scale, scale), args.multi_objective_aggregation)


def sampling_of(args: TrainingArguments | None, context: int | None = None) -> Sampling:
    """How the run would sample; without a GRPOConfig the default, whose answers take at most half of the model's context."""
    if not isinstance(args, GRPOConfig):
        longest = Sampling.max_new_tokens
        return Sampling(max_new_tokens=longest if context is None else max(1, min(longest, context // 2)))
    longest = args.max_completion_length or Sampling.max_new_tokens
    return Sampling(args.num_generations, longest, args.temperature)


def reward_weights(args: TrainingArguments | None) -> list[float] | None:
    """Of several rewards."""
    return args.reward_weights if isinstance(args, GRPOConfig) else None


def longest_sequence(args: TrainingArguments | None) -> int | None:
    """Tokens at which prompt and answer are cut; a trainer that samples cuts nothing."""
    return args.max_length if isinstance(args, DPOConfig) else None
