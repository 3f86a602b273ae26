"""Writing filtered rows in the formats that TRL reads; the same rows give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from datasets import Dataset

from ..data.opener import DatasetLike, Row, only_split, reader_of
from ..errors import AuditError

Format = Literal["jsonl", "parquet", "dataset"]


class Writer(Protocol):
    """Writes rows under a name without ending. `whole` writers take a Dataset, the others rows one at a time."""

    format: Format
    ending: str
    whole: bool

    def write(self, path: Path, rows: Any) -> None: ...


class JsonLines:
    """A line a row; a line that was not changed is written as it was read."""

    format: Format = "jsonl"
    ending = ".jsonl"
    whole = False

    def write(self, path: Path, rows: Iterable[Row]) -> None:
        with path.with_name(path.name + ".jsonl").open(
            "w", encoding="utf-8", errors="surrogateescape", newline="\n"
        ) as file:
            for row in rows:
                text = row.text if row.text is not None else _as_line(row.columns)
                file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


def _as_line(columns: Any) -> str:
    text = json.dumps(columns, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a half of a surrogate pair, which JSON can write, and UTF-8 cannot
        return json.dumps(columns, default=str)
    return text


class Parquet:
    """One Parquet file with the dataset's own schema."""

    format: Format = "parquet"
    ending = ".parquet"
    whole = True

    def write(self, path: Path, rows: Dataset) -> None:
        rows.to_parquet(path.with_name(path.name + ".parquet"))


class SavedDataset:
    """A directory made by `save_to_disk`, whose fingerprint depends on the rows alone."""

    format: Format = "dataset"
    ending = ""
    whole = True

    def write(self, path: Path, rows: Dataset) -> None:
        digest = hashlib.sha256(repr(rows.features).encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        flat = rows.select(range(len(rows)), new_fingerprint=digest.hexdigest()[:16])
        flat.save_to_disk(path)


_WRITERS: dict[Format, Writer] = {
    writer.format: writer for writer in (JsonLines(), Parquet(), SavedDataset())
}


def writer_for(source: DatasetLike, format: Format | None) -> Writer:
    """The writer of a format, or of the one the source came in.

    Raises:
        AuditError: an unknown format, or one that needs a schema where there is none.
    """
    format = format or _own_format(source)
    if format not in _WRITERS:
        raise AuditError(f"format is {format!r}; choose one of {', '.join(_WRITERS)}.")
    if format != "jsonl" and _own_format(source) == "jsonl":
        raise AuditError(
            f"format {format!r} needs a dataset with a schema; load the rows as a datasets.Dataset first, or write jsonl."
        )
    return _WRITERS[format]


def _own_format(source: DatasetLike) -> Format:
    if isinstance(source, (str, Path)) and Path(source).is_file():
        return "parquet" if reader_of(source) == "parquet" else "jsonl"
    return "dataset" if isinstance(only_split(source), (Dataset, str, Path)) else "jsonl"
