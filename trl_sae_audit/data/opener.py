"""One opener for every dataset: a file, a folder, what `save_to_disk` wrote, a name on the Hub, or rows in memory.

The library `datasets` reads; what is here chooses its reader and says what is wrong. On files only its packaged readers are used, so
nothing in a file is run, and a picture or a sound that a row names is not opened.

`iterate_rows` streams: of a file of JSON lines, CSV or Parquet some megabytes are in memory at a time (a JSON array is read whole), and
no rows are written. `open_dataset` makes the Dataset that a trainer needs: `datasets` copies the rows of a file as an Arrow table into
its own cache (`HF_DATASETS_CACHE`, by default `~/.cache/huggingface/datasets`) and maps it into memory.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, Json, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.features.features import _visit as visit_features
from datasets.io.csv import CsvDatasetReader
from datasets.io.json import JsonDatasetReader
from datasets.io.parquet import ParquetDatasetReader
from datasets.io.text import TextDatasetReader
from pyarrow import ArrowException

from ..errors import AuditError
from ..io.untrusted import check_regular, parse_json, read_json

DatasetLike: TypeAlias = Dataset | IterableDataset | DatasetDict | Sequence[Mapping[str, Any]] | str | Path
"""What holds rows: a dataset in memory or streamed, or the only split of a DatasetDict; a list of dicts; or a path or name. A path is
a file (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.parquet`, `.txt`, in any letter case, and with `.gz`), a folder of such files, or a
directory made by `save_to_disk`. Any other name is one of the Hub."""

_READERS = {
    "jsonl": "json",
    "ndjson": "json",
    "json": "json",
    "csv": "csv",
    "parquet": "parquet",
    "txt": "text",
}
_CLASSES: dict[str, Any] = {
    "json": JsonDatasetReader,
    "csv": CsvDatasetReader,
    "parquet": ParquetDatasetReader,
    "text": TextDatasetReader,
}
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?$")
_DAMAGES = (
    *(ArrowException, DatasetsError, zlib.error, AttributeError, EOFError, LookupError, OSError),
    *(OverflowError, RuntimeError, StopIteration, TypeError, ValueError),
)
"""What `datasets` and the libraries below it raise at broken files."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a dataset: its number from 0, and either its columns or what is wrong with it.

    `text` is the line of a JSON file, so that a line that is not JSON is not lost.
    """

    index: int
    columns: dict[str, Any] | None
    problem: str | None = None
    text: str | None = None


def open_dataset(
    name: str | Path | None,
    *,
    config: str | None = None,
    split: str | None = None,
    columns: Iterable[str] = (),
) -> Dataset:
    """The rows of a path or of a name on the Hub, as a trainer needs them.

    Args:
        name: see `DatasetLike`.
        config: which configuration of a dataset on the Hub.
        split: None for the only one, or "train" of several. A folder's splits are the names of its files, without the number of a
            shard; a single file is the split "train".
        columns: those it must have.

    Raises:
        AuditError: nothing is there, it cannot be read, it has no such split, or it lacks a column.
    """
    if name is None:
        raise AuditError("No dataset is named; pass --dataset_name with a file or the name of a dataset.")
    with _readable(name):
        located = _find(name, config, split)
        rows = located if isinstance(located, Dataset) else _load_whole(located)
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        there = ", ".join(rows.column_names)
        raise AuditError(
            f"{name} has no column {' and no column '.join(missing)} (it has {there}); rename its columns."
        )
    return rows


def iterate_rows(source: DatasetLike, split: str | None = None) -> Iterator[Row]:
    """Every row in order; a line that is not JSON is a row with a problem, not the end.

    Raises:
        AuditError: as `open_dataset`; or `source` is nothing that holds rows.
    """
    if isinstance(source, (str, Path)):
        yield from _rows_of_path(source, split)
        return
    rows: Any = only_split(source)
    if not isinstance(rows, (Dataset, IterableDataset, Sequence)):
        raise AuditError(
            f"The dataset is a {type(rows).__name__}; pass a datasets.Dataset or IterableDataset, a list of rows, or the path of a "
            "file or of a save_to_disk directory."
        )
    yield from map(_row, rows if isinstance(rows, Sequence) else _as_python(rows), itertools.count())


def _rows_of_path(source: str | Path, split: str | None) -> Iterator[Row]:
    with _readable(source):
        located = _find(source, None, split)
        if isinstance(located, list) and reader_of(located[0]) == "json":
            yield from _json_rows(located)
        else:
            rows = located if isinstance(located, Dataset) else _load(located, streaming=True)
            yield from map(_row, _as_python(rows), itertools.count())


def only_split(source: Any) -> Any:
    """The only split of a DatasetDict, or an AuditError if it has several; anything else as it is."""
    if isinstance(source, Mapping) and len(source) != 1:
        names = ", ".join(source)
        raise AuditError(f"The dataset has several splits ({names}); pass one, such as dataset['train'].")
    return next(iter(source.values())) if isinstance(source, Mapping) else source


def reader_of(path: str | Path) -> str | None:
    """Which reader of `datasets` reads a file of this name: "json", "csv", "parquet" or "text"."""
    return _READERS.get(Path(path).name.lower().removesuffix(".gz").rpartition(".")[2])


def without_format(dataset: Any) -> Any:
    """The dataset with rows of Python objects, whatever `with_format` asked for; a transform of the user's own stays."""
    own = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    return dataset if own else dataset.with_format(None)


def _find(name: str | Path, config: str | None, split: str | None) -> Dataset | list[Path]:
    """The rows, or the files of one format that hold them."""
    path = Path(name)
    if not path.exists():
        if reader_of(path) or str(name).count("/") > 1:
            raise AuditError(f"There is no dataset at {name}; check the path.")
        return load_dataset(str(name), config, split=split or "train")
    saved = any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
    splits = _load_saved(path) if saved else _shards(path) if path.is_dir() else {"train": [path]}
    wanted = next(iter(splits)) if split is None and len(splits) == 1 else split or "train"
    if wanted not in splits:
        raise AuditError(
            f"{name} has no split {wanted!r} but {', '.join(splits)}; choose one with --split (--dataset_train_split in a script)."
        )
    found = splits[wanted]
    kinds = set(map(reader_of, found)) if isinstance(found, list) else {"rows"}
    if None in kinds or len(kinds) > 1:
        raise AuditError(
            f"{name} has an unknown format, or files of several; give files that end in .{', .'.join(_READERS)} (or also in .gz)."
        )
    return found


def _shards(directory: Path) -> dict[str, list[Path]]:
    """The files of a folder by split: `train-00000-of-00002.parquet` and `train/0000.parquet` both belong to "train"."""
    splits: dict[str, list[Path]] = {}
    for path in filter(reader_of, sorted(directory.rglob("*"))):
        splits.setdefault(_SHARD.sub("", path.name.split(".")[0]) or path.parent.name, []).append(path)
    if not splits:
        raise AuditError(
            f"Directory {directory} holds no dataset made by save_to_disk and no data files (.{', .'.join(_READERS)}); check the path."
        )
    return splits


def _load_saved(path: Path) -> dict[str, Dataset]:
    """The splits that `save_to_disk` wrote into a directory.

    Its files are in the directory, by name (a link in it may lead elsewhere, as in the cache of the Hub); every value in them is
    checked, for Arrow takes places in a file as they are, and a wrong one reads memory that is not its own.
    """
    splits = path / "dataset_dict.json"
    for part in read_json(splits)["splits"] if splits.is_file() else ["."]:
        for entry in read_json(path / part / "state.json")["_data_files"]:
            for name in (part, entry["filename"]):
                if name != "." and (Path(name).name != name or name == ".."):
                    raise ValueError(f"it names {name!r}, which it does not contain")
            check_regular(path / part / entry["filename"])
    loaded = load_from_disk(str(path))
    datasets = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    for batch in itertools.chain.from_iterable(each.data.table.to_batches() for each in datasets.values()):
        batch.validate(full=True)
    return datasets


def _load(files: Sequence[Path], *, streaming: bool, sample_by: str = "paragraph", reader: str = "") -> Any:
    """By the readers of `datasets` and not by `load_dataset`, which asks the hub at every call to count it: without a network each
    call would wait for that."""
    reader = reader or str(reader_of(files[0]))
    options = {"encoding": "utf-8-sig", "sample_by": sample_by} if reader == "text" else {}
    for file in files:
        check_regular(file)
    names = [glob.escape(str(file.absolute())) for file in files]
    return _CLASSES[reader]({"train": names}, split="train", streaming=streaming, **options).read()


def _load_whole(files: list[Path]) -> Dataset:
    try:
        return _load(files, streaming=False)
    except _DAMAGES:
        for row in _json_rows(files) if reader_of(files[0]) == "json" else ():
            if row.problem:
                where = f"Row {row.index} of {files[0]} (counted from 0)"
                raise AuditError(f"{where} {row.problem}; correct or remove it.") from None
        raise


def _json_rows(files: Sequence[Path]) -> Iterator[Row]:
    """A row a line, or an element of an array; a single object may take several lines."""
    numbers = itertools.count()
    for file in files:
        lines = filter(str.strip, _texts(file, "line"))
        first = next(lines, "")
        if first.lstrip().startswith("[") or first.strip() == "{":
            whole = parse_json("".join(_texts(file, "document")))
            yield from map(_row, whole if isinstance(whole, list) else [whole], numbers)
        else:
            yield from map(_parse, itertools.chain([first] if first else [], lines), numbers)


def _texts(file: Path, sample_by: str) -> Iterator[str]:
    return (row["text"] for row in _load([file], streaming=True, sample_by=sample_by, reader="text"))


def _parse(text: str, index: int) -> Row:
    try:
        return _row(parse_json(text), index, text)
    except ValueError as error:
        what = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        return Row(index, None, f"is not valid JSON ({what})", text)


def _row(value: Any, index: int, text: str | None = None) -> Row:
    if isinstance(value, Mapping):
        return Row(index, dict(value), None, text)
    return Row(index, None, f"is a {type(value).__name__}, not a mapping of columns", text)


def _as_python(dataset: Dataset | IterableDataset) -> Iterator[dict[str, Any]]:
    """Rows of Python objects. A picture or a sound stays closed: which file to open is not for a dataset to say."""
    dataset = without_format(dataset)
    closed = dataset.features and visit_features(dataset.features, _close)
    if closed == dataset.features:
        yield from dataset
    else:
        for batch in dataset.with_format("arrow").iter(256):
            yield from map(closed.decode_example, batch.to_pylist())


def _close(feature: Any) -> Any:
    decodes = hasattr(feature, "decode") and not isinstance(feature, Json)
    return dataclasses.replace(feature, decode=False) if decodes else feature


@contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    """One sentence for all that the libraries raise."""
    try:
        yield
    except AuditError:
        raise
    except _DAMAGES as error:
        cause = error.__cause__ or error  # of an error that `datasets` wraps
        said = " ".join(str(cause).split()) or type(cause).__name__
        if isinstance(cause, UnicodeDecodeError):
            what = "is not UTF-8 text; convert it, for example with iconv -f UTF-16 -t UTF-8"
        elif isinstance(cause, StopIteration):
            what = "has no rows"
        elif Path(source).exists():
            what = f"cannot be read ({said}); correct it, or restore it from a copy"
        else:
            what = f"is not a file or directory, and cannot be loaded from the Hub ({said}); check the name, or give a path"
        raise AuditError(f"{source} {what}.") from error
