"""Rows for a training script, from a file or from the hub."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from .errors import AuditError
from .saved_datasets import load_saved

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(
    name: str | None, *, config: str | None = None, split: str = "train", columns: tuple[str, ...] = ()
) -> Dataset:
    """The rows of a JSONL, Parquet or CSV file (also `.gz`), of a saved data set, or of one on the hub.

    Args:
        name: path or hub name.
        config: which configuration of the data set.
        split: which split; of a file, its rows are the split "train".
        columns: those it must have.

    Raises:
        AuditError: no name, no such file, or a column missing.
    """
    if name is None:
        raise AuditError("No data set is named; pass --dataset_name with a file or the name of a data set.")
    rows = _rows(name, config, split)
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise AuditError(
            f"{name} has no column {' and no column '.join(missing)} (it has {', '.join(rows.column_names)}); "
            "rename its columns."
        )
    return rows


def _rows(name: str, config: str | None, split: str) -> Dataset:
    path = Path(name)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if suffixes and suffixes[-1] in _BUILDERS:
        if not path.is_file():
            raise AuditError(f"There is no data file {name}.")
        return _loaded(_BUILDERS[suffixes[-1]], split, data_files=name)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_saved(path)
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise AuditError(f"{name} has no split {split!r} but {', '.join(saved)}.")
        return saved[split]
    return _loaded(name, split, name=config)


def _loaded(source: str, split: str, **arguments: str | None) -> Dataset:
    try:
        return load_dataset(source, split=split, **arguments)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        what = arguments.get("data_files") or source
        cause = error.__cause__ or error  # of a DatasetGenerationError, what really went wrong
        raise AuditError(f"The data set {what!r} cannot be loaded: {' '.join(str(cause).split())}") from error
