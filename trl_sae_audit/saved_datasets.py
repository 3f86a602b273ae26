"""Datasets in files that others wrote: JSON lines, Parquet, and directories made by `save_to_disk`."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from datasets import Dataset, DatasetDict, load_from_disk
from datasets.features.features import require_decoding
from pyarrow import ArrowException

from .errors import AuditError
from .untrusted import check_regular, is_inside, read_json

_LONGEST_LINE = 2**26


def load_saved(path: Path) -> Dataset | DatasetDict:
    """What `save_to_disk` wrote into the directory `path`.

    Its files lie in the directory, by name (a link in it may lead elsewhere, as in the cache of the Hub); every value in them is
    checked, for Arrow takes places in a file as they stand, and a wrong one reads memory that is not its own.

    Raises:
        AuditError: nothing of the kind is there, or it is damaged.
    """
    try:
        for directory in _directories(path):
            _check_files(directory)
        loaded = load_from_disk(str(path))
        for each in loaded.values() if isinstance(loaded, DatasetDict) else [loaded]:
            for batch in each.data.table.to_batches():
                batch.validate(full=True)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArrowException,
        RecursionError,
    ) as error:
        raise AuditError(
            f"Directory {path} holds no dataset made by save_to_disk, or a damaged one ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); give its path, or a .jsonl or .parquet file."
        ) from error
    return loaded


def _directories(path: Path) -> list[Path]:
    splits = path / "dataset_dict.json"
    if not splits.is_file():
        return [path]
    names = read_json(splits)["splits"]
    for name in names:
        if not isinstance(name, str) or not is_inside(path, name):
            raise ValueError(f"it has a split {name!r}, which does not lie in it")
    return [path / name for name in names]


def _check_files(directory: Path) -> None:
    read_json(directory / "dataset_info.json")
    for entry in read_json(directory / "state.json")["_data_files"]:
        name = entry["filename"]
        if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it names the file {name!r}, which does not lie in it")
        check_regular(directory / name)


def rows_of(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset. A picture or a sound is not opened: where it lies is for the file to say, and not wanted here."""
    if not any(require_decoding(feature) for feature in dataset.features.values()):
        yield from dataset
        return
    for batch in dataset.with_format("arrow").iter(256):
        yield from batch.to_pylist()


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or gzipped, without their ends; bytes that are no UTF-8 as lone surrogates.

    Raises:
        AuditError: it cannot be read to its end, or has a line of more than 64 million characters.
    """
    try:
        with _opened(path) as file:
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
                yield line.rstrip("\n")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise AuditError(f"{path} cannot be read to its end ({error}); restore it from a copy.") from error


def _opened(path: Path) -> IO[str]:
    check_regular(path)
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="surrogateescape", newline="\n")
    return path.open(encoding="utf-8", errors="surrogateescape", newline="\n")
