"""The rows that stay and the rows that leave, in the kind they came in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value

from .filter_plan import FilterPlan
from .preferences import Row, Source, iterate_rows
from .saved_datasets import load_saved

_ROW, _SCORE, _REASON = "audit_row", "audit_score", "audit_reason"
_WHY_TYPES = {_ROW: Value("int64"), _SCORE: Value("float64"), _REASON: Value("string")}


def apply_plan(dataset: Source, plan: FilterPlan, weight_column: str) -> Any:
    """The rows that stay, in the input's own kind."""
    dataset = _loaded(dataset)
    if isinstance(dataset, Dataset):
        return _applied_to_dataset(dataset, plan, weight_column)
    if isinstance(dataset, IterableDataset):
        return _stream_kept(dataset, plan, weight_column)
    return [row.columns for row in kept_rows(dataset, plan, weight_column)]


def rows_that_leave(dataset: Source, plan: FilterPlan) -> Any:
    """The dropped rows with row number, score and reason, in the input's own kind."""
    dataset = _loaded(dataset)
    if isinstance(dataset, Dataset):
        columns = _why(plan, plan.dropped)
        return _with_columns(dataset.select(plan.dropped), columns, _WHY_TYPES)
    if isinstance(dataset, IterableDataset):
        return _stream_dropped(dataset, plan)
    return [row.columns for row in dropped_rows(dataset, plan)]


def kept_rows(dataset: Source, plan: FilterPlan, weight_column: str) -> Iterator[Row]:
    """The rows that stay, as they stay, one at a time."""
    for row in iterate_rows(dataset):
        action = plan.action[row.index]
        if action == "drop":
            continue
        if plan.settings["strategy"] == "weight" and row.columns is not None:
            row = dataclasses.replace(
                row, columns={**row.columns, weight_column: float(plan.weight[row.index])}, text=None
            )
        elif action == "flip" and row.columns is not None:
            row = dataclasses.replace(row, columns=_flipped(row.columns), text=None)
        yield row


def dropped_rows(dataset: Source, plan: FilterPlan) -> Iterator[Row]:
    """The rows that leave, one at a time, with row number, score and reason; a line that is no JSON in `text`."""
    for row in iterate_rows(dataset):
        if plan.action[row.index] == "drop":
            columns = dict(row.columns) if row.columns is not None else {"text": row.text}
            why = {name: values[0] for name, values in _why(plan, np.array([row.index])).items()}
            yield dataclasses.replace(row, columns=columns | why, text=None)


def _why(plan: FilterPlan, rows: np.ndarray) -> dict[str, list[Any]]:
    scores = [None if math.isnan(score) else float(score) for score in plan.score[rows]]
    return {_ROW: [int(row) for row in rows], _SCORE: scores, _REASON: [plan.reason[row] for row in rows]}


def _flipped(columns: Mapping[str, Any]) -> dict[str, Any]:
    swapped = dict(columns)
    swapped["chosen"], swapped["rejected"] = columns["rejected"], columns["chosen"]
    return swapped


def _applied_to_dataset(dataset: Dataset, plan: FilterPlan, weight_column: str) -> Dataset:
    kept = dataset.select(plan.kept)
    if plan.settings["strategy"] == "flip":
        flip = plan.action[plan.kept] == "flip"
        kept = kept.map(
            lambda row, index: _flipped(row) if flip[index] else row,
            with_indices=True,
            features=dataset.features,
            keep_in_memory=True,
            load_from_cache_file=False,
            desc="Flipping",
        )
    if plan.settings["strategy"] == "weight":
        column = {weight_column: plan.weight[plan.kept].tolist()}
        kept = _with_columns(kept, column, {weight_column: Value("float64")})
    return kept


def _with_columns(dataset: Dataset, columns: Mapping[str, list[Any]], types: Mapping[str, Value]) -> Dataset:
    """`dataset` with more columns, also where it has no rows."""
    if len(dataset) == 0:
        features = Features({**dataset.features, **types})
        return Dataset.from_dict({name: [] for name in features}, features=features)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values, feature=types[name])
    return dataset


def _stream_kept(dataset: IterableDataset, plan: FilterPlan, weight_column: str) -> IterableDataset:
    strategy = plan.settings["strategy"]
    if strategy == "flip":
        dataset = dataset.map(
            lambda row, index: _flipped(row) if plan.action[index] == "flip" else row, with_indices=True
        )
    if strategy == "weight":
        dataset = dataset.map(
            lambda row, index: {**row, weight_column: float(plan.weight[index])}, with_indices=True
        )
    return dataset.filter(lambda row, index: plan.action[index] != "drop", with_indices=True)


def _stream_dropped(dataset: IterableDataset, plan: FilterPlan) -> IterableDataset:
    def explained(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {**row, **{name: values[0] for name, values in _why(plan, np.array([index])).items()}}

    dataset = dataset.map(explained, with_indices=True)
    return dataset.filter(lambda row, index: plan.action[index] == "drop", with_indices=True)


def _loaded(dataset: Source) -> Source:
    """A dataset on disk as a Dataset; JSON lines are left as they lie, line by line."""
    if isinstance(dataset, (str, Path)):
        path = Path(dataset)
        if path.is_dir():
            return load_saved(path)
        if path.suffix == ".parquet":
            return Dataset.from_parquet(str(path))
    return dataset
