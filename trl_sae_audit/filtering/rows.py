"""The rows that are kept and the rows that are dropped, in the kind they came in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value

from ..data.opener import DatasetLike, Row, iterate_rows, only_split, open_dataset, reader_of, without_format
from .plan import FilterPlan

_ROW, _SCORE, _REASON = "audit_row", "audit_score", "audit_reason"
_REASON_TYPES = {_ROW: Value("int64"), _SCORE: Value("float64"), _REASON: Value("string")}


def apply_plan(dataset: DatasetLike, plan: FilterPlan, weight_column: str) -> Any:
    """The kept rows, in the input's own kind."""
    dataset = _open(dataset)
    if isinstance(dataset, Dataset):
        return _apply_to_dataset(dataset, plan, weight_column)
    if isinstance(dataset, IterableDataset):
        return _stream_kept(dataset, plan, weight_column)
    return [row.columns for row in iterate_kept(dataset, plan, weight_column)]


def select_dropped(dataset: DatasetLike, plan: FilterPlan) -> Any:
    """The dropped rows with row number, score and reason, in the input's own kind."""
    dataset = _open(dataset)
    if isinstance(dataset, Dataset):
        columns = _reasons(plan, plan.dropped)
        return _add_columns(dataset.select(plan.dropped), columns, _REASON_TYPES)
    if isinstance(dataset, IterableDataset):
        return _stream_dropped(dataset, plan)
    return [row.columns for row in iterate_dropped(dataset, plan)]


def iterate_kept(dataset: DatasetLike, plan: FilterPlan, weight_column: str) -> Iterator[Row]:
    """The kept rows, flipped, weighted and repeated, one at a time."""
    for row in iterate_rows(dataset):
        action = plan.action[row.index]
        if plan.settings["strategy"] == "weight" and row.columns is not None:
            row = dataclasses.replace(
                row, columns={**row.columns, weight_column: float(plan.weight[row.index])}, text=None
            )
        elif action == "flip" and row.columns is not None:
            row = dataclasses.replace(row, columns=_flip(row.columns), text=None)
        yield from [row] * int(plan.copies[row.index])


def iterate_dropped(dataset: DatasetLike, plan: FilterPlan) -> Iterator[Row]:
    """The dropped rows, one at a time, with row number, score and reason; a line that is no JSON in `text`."""
    for row in iterate_rows(dataset):
        if plan.action[row.index] == "drop":
            columns = dict(row.columns) if row.columns is not None else {"text": row.text}
            reasons = {name: values[0] for name, values in _reasons(plan, np.array([row.index])).items()}
            yield dataclasses.replace(row, columns=columns | reasons, text=None)


def _reasons(plan: FilterPlan, rows: np.ndarray) -> dict[str, list[Any]]:
    scores = [None if math.isnan(score) else float(score) for score in plan.score[rows]]
    return {_ROW: [int(row) for row in rows], _SCORE: scores, _REASON: [plan.reason[row] for row in rows]}


def _flip(columns: Mapping[str, Any]) -> dict[str, Any]:
    swapped = dict(columns)
    swapped["chosen"], swapped["rejected"] = columns["rejected"], columns["chosen"]
    return swapped


def _apply_to_dataset(dataset: Dataset, plan: FilterPlan, weight_column: str) -> Dataset:
    kept = dataset.select(plan.kept)
    if plan.settings["strategy"] == "flip":
        flip = plan.action[plan.kept] == "flip"
        kept = kept.map(
            lambda row, index: _flip(row) if flip[index] else row,
            with_indices=True,
            features=dataset.features,
            keep_in_memory=True,
            load_from_cache_file=False,
            desc="Flipping",
        )
    if plan.settings["strategy"] == "weight":
        column = {weight_column: plan.weight[plan.kept].tolist()}
        kept = _add_columns(kept, column, {weight_column: Value("float64")})
    return kept


def _add_columns(dataset: Dataset, columns: Mapping[str, list[Any]], types: Mapping[str, Value]) -> Dataset:
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
            lambda row, index: _flip(row) if plan.action[index] == "flip" else row, with_indices=True
        )
    if strategy == "weight":
        dataset = dataset.map(
            lambda row, index: {**row, weight_column: float(plan.weight[index])}, with_indices=True
        )
    return dataset.map(
        lambda rows, indices: {
            name: [
                value
                for value, index in zip(values, indices, strict=True)
                for _ in range(int(plan.copies[index]))
            ]
            for name, values in rows.items()
        },
        batched=True,
        with_indices=True,
    )


def _stream_dropped(dataset: IterableDataset, plan: FilterPlan) -> IterableDataset:
    def explain(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {**row, **{name: values[0] for name, values in _reasons(plan, np.array([index])).items()}}

    dataset = dataset.map(explain, with_indices=True)
    return dataset.filter(lambda row, index: plan.action[index] == "drop", with_indices=True)


def _open(dataset: DatasetLike) -> DatasetLike:
    """A dataset on disk as a Dataset; JSON is left as it is, line by line."""
    if isinstance(dataset, (str, Path)):
        return dataset if Path(dataset).is_file() and reader_of(dataset) == "json" else open_dataset(dataset)
    dataset = only_split(dataset)
    return without_format(dataset) if isinstance(dataset, (Dataset, IterableDataset)) else dataset
