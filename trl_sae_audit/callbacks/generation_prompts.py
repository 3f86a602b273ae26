"""Which prompts a model answers while its generations are watched: given ones, or some of the training's own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from ..errors import AuditError
from ..models.language_head import causal_model
from ..models.sampling import Sampling
from ..models.token_ids import Ids, tokenize_pairs
from ..models.tokenizers import text_tokenizer
from ..trainers.kinds import policy_of, trainer_kind

DRAWN = 64
"""Prompts that are drawn from the train set where none are given."""
_LOOKED_AT = 20
"""Rows that may be looked at for each of them: a prompt may appear often, or be too long."""


def prompts_for(trainer: Trainer, given: Any, sampling: Sampling) -> list[Ids]:
    """Token ids of the prompts, each once.

    Args:
        trainer: whose tokenizer, and, if none are given, whose train set.
        given: texts, conversations, or rows with a `prompt` of either kind; None draws DRAWN from the train set.
        sampling: its seed draws; a prompt leaves room for an answer in the model's context.

    Raises:
        AuditError: no prompts, or one that is too long or none.
    """
    longest = _longest(trainer, sampling)
    tokenizer = tokenizer_of(trainer)
    if given is None:
        prompts = _drawn(trainer, tokenizer, sampling.seed, longest)
    else:
        if isinstance(given, (str, Mapping)) or not len(given):
            raise AuditError(
                "There are no prompts in generation_prompts; give a list of texts or of conversations."
            )
        prompts = [
            _ids(trainer, tokenizer, _prompt_of(row), f"Prompt {n} of generation_prompts")
            for n, row in enumerate(given)
        ]
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= longest:
                raise AuditError(
                    f"Prompt {number} of generation_prompts has {len(prompt)} tokens, and with an answer of "
                    f"{sampling.max_new_tokens} it must have between 1 and {longest}; shorten it or the answers."
                )
    return list(dict.fromkeys(prompts))


def _longest(trainer: Trainer, sampling: Sampling) -> int:
    config = causal_model(policy_of(trainer)).config.get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        return 2**31
    return max(0, config.max_position_embeddings - sampling.max_new_tokens)


def _prompt_of(row: Any) -> Any:
    return row.get("prompt") if isinstance(row, Mapping) else row


def _drawn(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, seed: int, longest: int) -> list[Ids]:
    distinct: dict[Ids, None] = {}
    for number, prompt in enumerate(_of_train_set(trainer, tokenizer, seed)):
        if 0 < len(prompt) <= longest:
            distinct[prompt] = None
        if len(distinct) == DRAWN or number + 1 == DRAWN * _LOOKED_AT:
            break
    if not distinct:
        raise AuditError(
            f"No prompt of the train set has between 1 and {longest} tokens, so that an answer fits into the model's context; "
            "pass generation_prompts, or a Sampling with a smaller max_new_tokens."
        )
    return list(distinct)


def _of_train_set(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Ids]:
    """Prompts of the train set in random order, as the trainer shows them to the model."""
    dataset = trainer.train_dataset
    columns = dataset.column_names if isinstance(dataset, Dataset) else []
    tokens = "input_ids" if trainer_kind(trainer) == "PPOTrainer" else "prompt_ids"
    column = next((name for name in (tokens, "prompt", "messages") if name in columns), None)
    if column is None:
        raise AuditError(
            f"{type(trainer).__name__} has no prompts in its train set (columns: {', '.join(columns) or 'unknown'}), so there is "
            "nothing to answer; pass generation_prompts."
        )
    places = random.Random(seed).sample(range(len(dataset)), len(dataset))
    for place in places:
        value = dataset[place][column]
        if column == "messages":
            value = value[:-1] if value and value[-1]["role"] == "assistant" else value
        yield (
            tuple(value)
            if column == tokens
            else _ids(trainer, tokenizer, value, f"Row {place} of the train set")
        )


def _ids(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, prompt: Any, name: str) -> Ids:
    if isinstance(prompt, str):
        return tokenize_pairs(tokenizer, [prompt], [""])[0][0]
    if not isinstance(prompt, Sequence) or not all(
        isinstance(part, Mapping) and "role" in part for part in prompt
    ):
        raise AuditError(f"{name} is neither a text nor a conversation; give generation_prompts that are.")
    if not prompt:
        return ()
    if tokenizer.chat_template is None:
        raise AuditError(
            f"{name} is a conversation, but the tokenizer has no chat template; give texts as generation_prompts."
        )
    begun = prompt[-1]["role"] == "assistant"
    template = (
        (trainer.args.chat_template_kwargs or {}) if hasattr(trainer.args, "chat_template_kwargs") else {}
    )
    rendered = tokenizer.apply_chat_template(
        [dict(message) for message in prompt],
        add_generation_prompt=not begun,
        continue_final_message=begun,
        return_dict=True,
        **template,
    )
    return tuple(rendered["input_ids"])


def tokenizer_of(trainer: Trainer) -> PreTrainedTokenizerBase:
    """The tokenizer with which the trainer's policy reads prompts, out of its processor where it has one."""
    return text_tokenizer(trainer.processing_class, policy_of(trainer))
