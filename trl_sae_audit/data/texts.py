"""Texts to look at a model with: plain, conversational or preference data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import AuditError
from .opener import DatasetLike, iterate_rows
from .preferences import has_lone_surrogates, holds_prompt, is_conversation

_LAYOUTS = ["text", "messages", "prompt chosen rejected", "prompt completion", "chosen rejected", "prompt"]


def read_texts(
    source: DatasetLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str] | None = None,
    split: str | None = None,
    prompt_separator: str = "",
    limit: int | None = None,
) -> list[str]:
    """The distinct texts of a dataset, in its order.

    Args:
        source: any dataset, see `DatasetLike`; the texts of a `.txt` file are its paragraphs.
        tokenizer: its chat template renders conversations.
        columns: each named column gives its own texts, except `prompt`, which is put before each of the others as
            TRL's trainers put it. None recognises TRL's layouts: text, messages, prompt/chosen/rejected,
            prompt/completion, chosen/rejected, prompt.
        split: which split, of a dataset on disk or on the Hub that has several.
        prompt_separator: what separates prompt and answer where both are plain strings; TRL puts nothing.
        limit: choose that many of them at random, the same ones every time.

    Raises:
        AuditError: if the source is missing, unreadable or empty, has none of the columns, or is a
            conversation and the tokenizer has no chat template.
    """
    name = str(source) if isinstance(source, (str, Path)) else "The dataset"
    texts: dict[str, None] = {}
    for row in iterate_rows(source, split):
        if row.columns is None:
            raise AuditError(
                f"Row {row.index} of {name} (counted from 0) {row.problem}; correct or remove it."
            )
        for text in _texts_of(row.columns, columns, tokenizer, prompt_separator, name):
            if has_lone_surrogates(text):
                raise AuditError(
                    f"{name} has a text with a half of a surrogate pair, which no tokenizer reads: {text[:40]!r}…; correct it."
                )
            if text.strip():
                texts[text] = None
    if not texts:
        raise AuditError(f"{name} has no text in it; give another file or other columns.")
    every = list(texts)
    if limit is None or limit >= len(every):
        return every
    return [every[index] for index in sorted(random.Random(0).sample(range(len(every)), limit))]


def _texts_of(
    row: Mapping[str, Any],
    columns: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    separator: str,
    source: str,
) -> Iterator[str]:
    layouts = map(str.split, _LAYOUTS)
    wanted = columns or next((layout for layout in layouts if all(name in row for name in layout)), None)
    if wanted is None:
        raise AuditError(
            f"{source} has the columns {', '.join(row)}, none of which is known to hold text; name the text columns with --columns."
        )
    missing = [name for name in wanted if name not in row]
    if missing:
        raise AuditError(f"{source} has no column {missing[0]!r}; it has {', '.join(row)}.")
    prompt = row["prompt"] if "prompt" in wanted else None
    answers = [row[name] for name in wanted if name != "prompt"]
    for answer in answers or [None]:
        yield _join(prompt, answer, tokenizer, separator)


def _join(prompt: Any, answer: Any, tokenizer: PreTrainedTokenizerBase, separator: str) -> str:
    """One text of a prompt and an answer, either of them possibly absent, strings or lists of messages."""
    if isinstance(prompt, str) and holds_prompt(answer):
        prompt = None
    parts = [part for part in (prompt, answer) if part is not None]
    if all(isinstance(part, str) for part in parts):
        return separator.join(parts)
    messages: list[Any] = []
    for part, role in ((prompt, "user"), (answer, "assistant")):
        if part is not None:
            said = {"role": role, "content": part} if isinstance(part, str) else part
            messages += part if isinstance(part, list) else [said]
    if not messages or not is_conversation(messages):
        raise AuditError(
            "A column that should hold text holds something else; name the columns with text by --columns."
        )
    if tokenizer.chat_template is None:
        raise AuditError(
            "The texts are conversations, but the tokenizer has no chat template; use the tokenizer of a chat model, "
            "or give plain text."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise AuditError(
            f"The tokenizer's chat template cannot render a conversation ({error}): its messages are "
            f"{[message['role'] for message in messages]!r}; correct the texts, or use another tokenizer."
        ) from error
