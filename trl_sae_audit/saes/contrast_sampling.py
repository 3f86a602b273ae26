"""Contrastive pairs that a model writes itself: its answers to the same questions under two system prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import AuditError
from ..models.language_head import causal_model
from ..models.sampling import Sampling, sample_ids
from ..models.token_ids import Ids, tokenize_pairs
from ..models.tokenizers import Processing, text_tokenizer


def sample_contrasts(
    model: nn.Module,
    tokenizer: Processing,
    questions: Sequence[str],
    positive: str,
    negative: str,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Pairs for `contrast_directions`: to each question an answer under either system prompt, with the same random numbers.

    The pairs themselves have the question alone, so that a direction tells answers apart and not the instructions before them.

    Args:
        model: a causal language model, that whose directions are wanted.
        tokenizer: its own, with a chat template, or a processor that has it.
        questions: what it is asked; each counts once.
        positive: the system prompt that asks for the trait.
        negative: one that asks for its absence, of like length at best.
        max_new_tokens: longest answer.
        batch_size: answers sampled at a time.
        seed: of sampling.
        progress: show a bar.

    Raises:
        AuditError: no chat template, no questions, or the same system prompt twice.
    """
    reader = text_tokenizer(tokenizer, causal_model(model))
    asked = list(dict.fromkeys(question for question in questions if question.strip()))
    if not asked:
        raise AuditError("There are no questions to ask under the system prompts; give some.")
    if positive == negative:
        raise AuditError("Both system prompts are the same, so that the answers have nothing to differ in.")
    if reader.chat_template is None:
        raise AuditError(
            "The tokenizer has no chat template, so there is no place for a system prompt; take a chat model, or give pairs of answers."
        )
    sampling = Sampling(answers=1, max_new_tokens=max_new_tokens, seed=seed)
    answers = []
    for system in (positive, negative):
        begun = [_ids(reader, system, question) for question in asked]
        sampled = sample_ids(model, reader, begun, sampling, batch_size=batch_size, progress=progress)
        answers.append([reader.decode(each[0], skip_special_tokens=True) for each in sampled])
    return [
        {"prompt": [{"role": "user", "content": question}], "positive": one, "negative": other}
        for question, one, other in zip(asked, *answers, strict=True)
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, system: str, question: str) -> Ids:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    try:
        return tokenize_pairs(tokenizer, [messages], [""])[0][0]
    except TemplateError:  # a template without a place for it, as Gemma's
        joined = [{"role": "user", "content": f"{system}\n\n{question}"}]
        return tokenize_pairs(tokenizer, [joined], [""])[0][0]
