"""Writing filtered rows in the formats that TRL reads; the same rows give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset

from .errors import AuditError
from .preferences import Row, Source

FORMATS = ("jsonl", "parquet", "dataset")


class Writer(Protocol):
    """Writes rows under a name without ending, and returns the name with it.

    `whole` writers take a Dataset, the others rows one at a time.
    """

    whole: bool

    def write(self, path: Path, rows: Any) -> str: ...


class JsonLines:
    """A line a row; a line that was not changed is written as it was read."""

    whole = False

    def write(self, path: Path, rows: Iterable[Row]) -> str:
        target = path.with_name(path.name + ".jsonl")
        with target.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for row in rows:
                text = row.text if row.text is not None else _as_line(row.columns)
                file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        return target.name


def _as_line(columns: Any) -> str:
    text = json.dumps(columns, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a half of a surrogate pair, which JSON can write, and UTF-8 cannot
        return json.dumps(columns, default=str)
    return text


class Parquet:
    """One Parquet file with the dataset's own schema."""

    whole = True

    def write(self, path: Path, rows: Dataset) -> str:
        target = path.with_name(path.name + ".parquet")
        rows.to_parquet(target)
        return target.name


class OnDisk:
    """A directory made by `save_to_disk`, whose fingerprint depends on the rows alone."""

    whole = True

    def write(self, path: Path, rows: Dataset) -> str:
        digest = hashlib.sha256(repr(rows.features).encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        flat = rows.select(range(len(rows)), new_fingerprint=digest.hexdigest()[:16])
        flat.save_to_disk(path)
        return path.name


def writer_for(source: Source, format: str | None) -> Writer:
    """The writer of a format, or of the one the source came in.

    Raises:
        AuditError: an unknown format, or one that needs a schema where there is none.
    """
    format = format or _own_format(source)
    if format not in FORMATS:
        raise AuditError(f"format is {format!r}; choose one of {', '.join(FORMATS)}.")
    if format != "jsonl" and _own_format(source) == "jsonl":
        raise AuditError(
            f"format {format!r} needs a dataset with a schema; load the rows as a datasets.Dataset first, or write jsonl."
        )
    writers: dict[str, Writer] = {"jsonl": JsonLines(), "parquet": Parquet(), "dataset": OnDisk()}
    return writers[format]


def _own_format(source: Source) -> str:
    if isinstance(source, (str, Path)):
        path = Path(source)
        return "dataset" if path.is_dir() else "parquet" if path.suffix == ".parquet" else "jsonl"
    return "dataset" if isinstance(source, Dataset) else "jsonl"
