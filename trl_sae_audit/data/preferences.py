"""Preference pairs in any of TRL's layouts: what is wrong with a row, and what identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import AuditError
from .opener import Row as Row
from .opener import iterate_rows as iterate_rows

ANSWERS = ("chosen", "rejected")
_COLUMNS = ("prompt", *ANSWERS)
LONGEST_TEXT = 2**24
"""Characters of a prompt or an answer."""
_PICTURES = ("image", "images")
_READ_BY_TRL = (*_COLUMNS, "tools", "chat_template_kwargs")


def is_conversation(value: Any) -> bool:
    """Whether a prompt or an answer is a list of messages."""
    return isinstance(value, list) and all(isinstance(part, Mapping) and "role" in part for part in value)


def holds_prompt(answer: Any) -> bool:
    """Whether an answer is a list of messages that begins with the prompt's."""
    return is_conversation(answer) and bool(answer) and answer[0]["role"] != "assistant"


class PairCheck:
    """Says what is wrong with a row, if anything; the first row decides which layout the others must have.

    Raises:
        AuditError: from the first row, if the columns TRL reads are missing altogether.
    """

    def __init__(self) -> None:
        self._layout: tuple[bool, bool] | None = None

    def __call__(self, row: Row) -> str | None:
        """A phrase to follow "row N", or None for a pair that TRL can train on."""
        if row.columns is None:
            return row.problem
        if self._layout is None:
            missing = [name for name in ANSWERS if name not in row.columns]
            if missing:
                raise AuditError(
                    f"The dataset has no column {' and no column '.join(map(repr, missing))}, but {sorted(row.columns)}; "
                    "a preference dataset has 'chosen' and 'rejected', and mostly 'prompt': rename its columns."
                )
        return self._wrong_answers(row.columns) or self._wrong_layout(row.columns)

    def _wrong_answers(self, columns: Mapping[str, Any]) -> str | None:
        for name in ANSWERS:
            value = columns.get(name)
            if value is None:
                return f"has no {name!r}"
            if not isinstance(value, str) and not is_conversation(value):
                return f"has a {name!r} that is neither text nor a list of messages"
            if not _content(value):
                return f"has an empty {name!r}"
        for name in _COLUMNS:
            problem = _unreadable(columns.get(name))
            if problem:
                return f"has a {name!r} {problem}"
        if any(columns.get(name) for name in _PICTURES):
            return "has pictures, which an audit cannot read"
        prompt = columns.get("prompt")
        if prompt is None and columns["chosen"] == columns["rejected"]:
            return "has the same text as 'chosen' and 'rejected', so its prompt cannot be separated from its answers"
        if prompt is not None and not isinstance(prompt, str) and not is_conversation(prompt):
            return "has a 'prompt' that is neither text nor a list of messages"
        return None

    def _wrong_layout(self, columns: Mapping[str, Any]) -> str | None:
        given = [name for name in _COLUMNS if columns.get(name) is not None]
        conversational = {name: is_conversation(columns[name]) for name in given}
        if len(set(conversational.values())) > 1:
            # ultrafeedback_binarized is such a dataset; TRL's DPOTrainer refuses it too
            way_out = ": they begin with the prompt, so remove the column 'prompt' from the dataset"
            redundant = not conversational.get("prompt", True) and holds_prompt(columns["chosen"])
            return "mixes text and lists of messages" + way_out * redundant
        layout = (columns.get("prompt") is not None, conversational["chosen"])
        if self._layout is None:
            self._layout = layout
        if layout[0] != self._layout[0]:
            return f"has {'a' if layout[0] else 'no'} prompt, unlike the rows before it"
        if layout[1] != self._layout[1]:
            return f"is {'conversational' if layout[1] else 'plain text'}, unlike the rows before it"
        return None


def has_lone_surrogates(text: str) -> bool:
    """Whether a text has halves of surrogate pairs, which no tokenizer reads."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _unreadable(value: Any) -> str | None:
    """What keeps a text, or the texts of a list of messages, from being tokenized: a phrase, or None."""
    texts = [value] if isinstance(value, str) else []
    if is_conversation(value):
        for message in value:
            if not isinstance(message["role"], str):
                return f"with a message whose role is {message['role']!r}"
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
            for part in parts:
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                    return "with a message whose content is not text"
                texts.append(part["text"])
    for text in texts:
        if len(text) > LONGEST_TEXT:
            return f"of {len(text):,} characters, where at most {LONGEST_TEXT:,} are read"
        if has_lone_surrogates(text):
            return "with characters that are no text (halves of surrogate pairs)"
    return None


def _content(value: Any) -> str:
    """The text of an answer, without surrounding space."""
    if isinstance(value, str):
        return value.strip()
    said = (message.get("content") or message.get("tool_calls") or "" for message in value[-1:])
    return "".join(map(str, said)).strip()


def read_by_trl(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that decide what TRL trains on."""
    return {name: columns[name] for name in _READ_BY_TRL if columns.get(name) is not None}


def row_digest(row: Row) -> bytes:
    """SHA-256 of what TRL reads of a row, the same wherever the row is stored; other columns do not count."""
    if row.columns is None:
        content = row.text or row.problem or ""
    else:
        answers = {name: row.columns[name] for name in ("completion", "advantage") if name in row.columns}
        read = _plain(read_by_trl(row.columns) | answers)
        content = json.dumps(read, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(content.encode("utf-8", errors="surrogateescape")).digest()


def _plain(value: Any) -> Any:
    """Without the empty fields that Arrow adds to messages of unequal keys."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def as_text(value: Any) -> str:
    """A prompt or an answer as one string to look at."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{message.get('role')}: {message.get('content') or ''}" for message in value or [])
