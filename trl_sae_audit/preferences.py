"""Preference pairs, wherever they lie and whichever of TRL's layouts they have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset

from .errors import AuditError
from .saved_datasets import lines_of, load_saved, rows_of
from .untrusted import parse_json
from .untrusted_tables import iterate_parquet

Source: TypeAlias = Dataset | IterableDataset | Sequence[Mapping[str, Any]] | str | Path
"""What holds preference pairs: a dataset in memory or streamed, a list of rows, or a path: a directory made by
`save_to_disk`, a Parquet file, or JSON lines, plain or gzipped."""

ANSWERS = ("chosen", "rejected")
LONGEST_TEXT = 2**24
"""Characters of a prompt or an answer."""
_PICTURES = ("image", "images")
_READ_BY_TRL = ("prompt", *ANSWERS, "tools", "chat_template_kwargs")
_JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One row of a source: its number from 0, and either its columns or what is wrong with it.

    `text` is the line of a JSON file as it stands, so that a line that is no JSON is not lost.
    """

    index: int
    columns: dict[str, Any] | None
    problem: str | None = None
    text: str | None = None


def iterate_rows(source: Source) -> Iterator[Row]:
    """Every row in order; a line that cannot be parsed is a row with a problem, not the end.

    Raises:
        AuditError: the path does not exist, or is of a format not known.
    """
    if isinstance(source, (str, Path)):
        yield from _rows_of_path(Path(source))
        return
    if isinstance(source, (DatasetDict, dict)):
        raise AuditError(
            f"The dataset has several splits ({', '.join(source)}); pass one, dataset['train'] say."
        )
    if not isinstance(source, (Dataset, IterableDataset, Sequence)):
        raise AuditError(
            f"The dataset is a {type(source).__name__}; pass a datasets.Dataset or IterableDataset, a list of rows, "
            "or the path of a .jsonl, .parquet or save_to_disk directory."
        )
    yield from _numbered(rows_of(source) if isinstance(source, Dataset) else source)


def _numbered(rows: Iterable[Any]) -> Iterator[Row]:
    for index, columns in enumerate(rows):
        if isinstance(columns, Mapping):
            yield Row(index, dict(columns))
        else:
            yield Row(index, None, f"is a {type(columns).__name__}, not a mapping of columns")


def _rows_of_path(path: Path) -> Iterator[Row]:
    if path.is_dir():
        yield from iterate_rows(load_saved(path))
    elif not path.is_file():
        raise AuditError(f"There is no dataset at {path}; check the path.")
    elif path.suffix == ".parquet":
        try:
            yield from _numbered(iterate_parquet(path))
        except (OSError, ValueError) as error:
            raise AuditError(
                f"{path} cannot be read as Parquet ({error}); restore it from a copy."
            ) from error
    elif path.name.endswith(_JSON_LINES):
        yield from _json_lines(path)
    else:
        raise AuditError(f"{path} has an unknown format; give a .jsonl, .jsonl.gz or .parquet file.")


def _json_lines(path: Path) -> Iterator[Row]:
    lines = (text for text in lines_of(path) if text.strip())
    for index, text in enumerate(lines):
        yield _parsed(index, text)


def _parsed(index: int, text: str) -> Row:
    try:
        columns = parse_json(text)
    except json.JSONDecodeError as error:
        return Row(index, None, f"is not valid JSON ({error.msg} at character {error.pos})", text)
    except ValueError as error:
        return Row(index, None, f"is not valid JSON ({error})", text)
    if not isinstance(columns, dict):
        return Row(index, None, f"is a JSON {type(columns).__name__}, not an object of columns", text)
    return Row(index, columns, None, text)


def is_conversation(value: Any) -> bool:
    """Whether a prompt or an answer is a list of messages."""
    return isinstance(value, list) and all(isinstance(part, Mapping) and "role" in part for part in value)


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
        for name in ("prompt", *ANSWERS):
            problem = _unreadable(columns.get(name))
            if problem:
                return f"has a {name!r} {problem}"
        if any(columns.get(name) for name in _PICTURES):
            return "has pictures, of which an audit sees nothing"
        prompt = columns.get("prompt")
        if prompt is None and columns["chosen"] == columns["rejected"]:
            return (
                "has the same text as 'chosen' and 'rejected', so its prompt cannot be told from its answers"
            )
        if prompt is not None and not isinstance(prompt, str) and not is_conversation(prompt):
            return "has a 'prompt' that is neither text nor a list of messages"
        return None

    def _wrong_layout(self, columns: Mapping[str, Any]) -> str | None:
        conversational = {
            name: is_conversation(columns[name])
            for name in ("prompt", *ANSWERS)
            if columns.get(name) is not None
        }
        if len(set(conversational.values())) > 1:
            return "mixes text and lists of messages"
        layout = (columns.get("prompt") is not None, conversational["chosen"])
        if self._layout is None:
            self._layout = layout
        if layout[0] != self._layout[0]:
            return f"has {'a' if layout[0] else 'no'} prompt, unlike the rows before it"
        if layout[1] != self._layout[1]:
            return f"is {'conversational' if layout[1] else 'plain text'}, unlike the rows before it"
        return None


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
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            return "with characters that are no text (bytes that are no UTF-8, or halves of surrogate pairs)"
    return None


def _content(value: Any) -> str:
    """The text of an answer, without surrounding space."""
    if isinstance(value, str):
        return value.strip()
    return "".join(
        str(message.get("content") or message.get("tool_calls") or "") for message in value[-1:]
    ).strip()


def read_by_trl(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that decide what TRL trains on."""
    return {name: columns[name] for name in _READ_BY_TRL if columns.get(name) is not None}


def row_digest(row: Row) -> bytes:
    """SHA-256 of what TRL reads of a row, the same wherever the row is stored; other columns do not count."""
    if row.columns is None:
        content = row.text or row.problem or ""
    else:
        answers = {name: row.columns[name] for name in ("completion", "advantage") if name in row.columns}
        content = json.dumps(
            _plain(read_by_trl(row.columns) | answers), sort_keys=True, separators=(",", ":"), default=str
        )
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
