"""Texts to look at a model with: plain, conversational or preference data, from a file or a saved dataset."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .errors import AuditError
from .untrusted import LARGEST_TEXT, check_regular, parse_json, read_bytes

_LAYOUTS = (
    ("text",),
    ("messages",),
    ("prompt", "chosen", "rejected"),
    ("prompt", "completion"),
    ("chosen", "rejected"),
    ("prompt",),
)


def read_texts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str] | None = None,
    split: str = "train",
    prompt_separator: str = "",
    limit: int | None = None,
) -> list[str]:
    """The distinct texts of a data set, in its order.

    Args:
        source: a file `.jsonl`, `.json`, `.parquet` or `.txt` (paragraphs; each may end in `.gz` but Parquet), a
            directory saved by `datasets`, or the name of a data set on the Hub.
        tokenizer: its chat template renders conversations.
        columns: each column named gives texts of its own, save `prompt`, which goes before each of the others as
            TRL's trainers put it. None recognises TRL's layouts: text, messages, prompt/chosen/rejected,
            prompt/completion, chosen/rejected, prompt.
        split: which split, of a data set that has several.
        prompt_separator: what stands between prompt and answer where both are plain strings; TRL puts nothing.
        limit: choose that many of them at random, the same ones every time.

    Raises:
        AuditError: if the source is missing, unreadable or empty, has none of the columns, or is a
            conversation and the tokenizer has no chat template.
    """
    texts: dict[str, None] = {}
    for row in _rows(source, split):
        for text in _texts_of(row, columns, tokenizer, prompt_separator, source):
            if text.strip():
                texts[_checked(text, source)] = None
    if not texts:
        raise AuditError(f"{source} has no text in it; give another file or other columns.")
    found = list(texts)
    if limit is None or limit >= len(found):
        return found
    return [found[index] for index in sorted(random.Random(0).sample(range(len(found)), limit))]


def _checked(text: str, source: str | Path) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise AuditError(
            f"{source} has a text with a half of a surrogate pair, which no tokenizer reads: {text[:40]!r}…; correct it."
        )
    return text


def _rows(source: str | Path, split: str) -> Iterator[dict[str, Any]]:
    path = Path(source)
    if path.is_dir():
        return _saved_dataset(path, split)
    if not path.is_file():
        return _hub_dataset(str(source), split)
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet, ".txt": _paragraphs}
    if kind not in readers:
        raise AuditError(f"{path} is of no known kind ({', '.join(sorted(readers))}); convert or rename it.")
    return readers[kind](path)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    content = _read(path)
    if content.lstrip().startswith("["):
        numbered: Iterable[tuple[int, str]] = [(1, content)]
    else:
        numbered = ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())
    for number, line in numbered:
        try:
            value = parse_json(line)
        except ValueError as error:
            raise AuditError(f"{path}, line {number}: not valid JSON ({error}); mend the file.") from error
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise AuditError(
                    f"{path}, line {number}: not an object with columns; write one JSON object a line."
                )
            yield row


def _paragraphs(path: Path) -> Iterator[dict[str, Any]]:
    for paragraph in _read(path).split("\n\n"):
        yield {"text": paragraph}


def _read(path: Path) -> str:
    try:
        if path.suffix != ".gz":
            return read_bytes(path, LARGEST_TEXT).decode("utf-8-sig")
        check_regular(path)
        with gzip.open(path) as file:
            content = file.read(LARGEST_TEXT + 1)
        if len(content) > LARGEST_TEXT:
            raise ValueError(f"it unpacks to more than {LARGEST_TEXT:,} bytes")
        return content.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise AuditError(f"{path} cannot be read as text: {error}.") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from .untrusted_tables import iterate_parquet

    try:
        yield from iterate_parquet(path)
    except (OSError, ValueError) as error:
        raise AuditError(f"{path} cannot be read as Parquet: {error}.") from error


def _saved_dataset(path: Path, split: str) -> Iterator[dict[str, Any]]:
    from .saved_datasets import load_saved

    return _one_split(load_saved(path), str(path), split)


def _hub_dataset(name: str, split: str) -> Iterator[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    if name.count("/") > 1 or Path(name).suffix in {".jsonl", ".json", ".parquet", ".txt", ".gz"}:
        raise AuditError(f"There is no file {name}; give the path of your texts.")
    try:
        return _one_split(datasets.load_dataset(name), name, split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise AuditError(
            f"There is no file or directory {name!r}, and as a data set on the Hub it cannot be loaded "
            f"({' '.join(str(error).split())}); give the path of your texts."
        ) from error


def _one_split(loaded: Any, name: str, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    from .saved_datasets import rows_of

    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise AuditError(f"{name} has no split {split!r}; pass --split with one of {', '.join(loaded)}.")
        loaded = loaded[split]
    return rows_of(loaded)


def _texts_of(
    row: dict[str, Any],
    columns: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    separator: str,
    source: str | Path,
) -> Iterator[str]:
    wanted = columns or next((layout for layout in _LAYOUTS if all(name in row for name in layout)), None)
    if wanted is None:
        raise AuditError(
            f"{source} has the columns {', '.join(row)}, none of which is known to hold text; name yours with --columns."
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
    parts = [part for part in (prompt, answer) if part is not None]
    if all(isinstance(part, str) for part in parts):
        return separator.join(parts)
    messages: list[dict[str, Any]] = []
    for part, role in ((prompt, "user"), (answer, "assistant")):
        if isinstance(part, str):
            messages.append({"role": role, "content": part})
        elif isinstance(part, list):
            messages.extend(part)
        elif part is not None:
            messages.append({})  # neither text nor messages
    if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
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
