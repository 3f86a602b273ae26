"""Prune, flip or weight a preference dataset by what an audit says its examples teach."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from datasets import Dataset, Features, IterableDataset, Value, load_from_disk

from .errors import AuditError
from .filter_writers import Writer, writer_for
from .flags import Flag, FlagSet
from .preferences import PairCheck, Row, Source, iterate_rows, row_digest

if TYPE_CHECKING:
    from .audit_result import Audit

STRATEGIES = ("drop", "flip", "weight", "resample")
SCORES = ("attribution", "influence", "activation")
_ROW, _SCORE, _REASON = "audit_row", "audit_score", "audit_reason"
_WHY_TYPES = {_ROW: Value("int64"), _SCORE: Value("float64"), _REASON: Value("string")}
_CONTROL = "control"


@dataclass(frozen=True)
class FilterPlan:
    """What is to become of every row, before anything is written.

    Attributes:
        action: "keep", "drop", "flip" or "weight" of each row [rows].
        score: what decided, NaN for a row the audit set aside [rows]. In units of the root mean square over
            examples, summed over flags by weight; positive = the row teaches what the flags object to.
        weight: 1 but for rows that are weighted down [rows].
        reason: empty but for rows that are not simply kept [rows].
        settings: what it was made from; enough to make it again.
    """

    action: np.ndarray
    score: np.ndarray
    weight: np.ndarray
    reason: list[str]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.action)

    @property
    def dropped(self) -> np.ndarray:
        """Numbers of the rows that leave."""
        return np.flatnonzero(self.action == "drop")

    @property
    def kept(self) -> np.ndarray:
        """Numbers of the rows that stay, flipped and weighted ones among them."""
        return np.flatnonzero(self.action != "drop")

    def table(self) -> pd.DataFrame:
        """One row a row of the data: row, action, score, weight, reason."""
        return pd.DataFrame(
            {
                "row": np.arange(len(self)),
                "action": self.action,
                "score": self.score,
                "weight": self.weight,
                "reason": self.reason,
            }
        )

    def control(self, seed: int) -> FilterPlan:
        """As many rows chosen at random, with the same done to them: any smaller dataset trains differently.

        Rows that the audit set aside leave here too.
        """
        unscored = np.isnan(self.score)
        chosen = np.flatnonzero((self.action != "keep") & ~unscored)
        drawn = np.random.default_rng(seed).permutation(np.flatnonzero(~unscored))[: len(chosen)]
        action = np.where(unscored, self.action, "keep")
        weight = np.ones_like(self.weight)
        reason = [text if aside else "" for text, aside in zip(self.reason, unscored, strict=True)]
        for place, source in zip(np.sort(drawn), chosen, strict=True):
            action[place], weight[place] = self.action[source], self.weight[source]
            reason[place] = "drawn at random, as a control"
        return dataclasses.replace(
            self, action=action, weight=weight, reason=reason, settings=self.settings | {"control_seed": seed}
        )


@dataclass(frozen=True)
class FilterResult:
    """What `filter_preferences` made.

    Attributes:
        kept: the rows that stay, in order and with every column; of the kind of the input, or a list of rows
            for a list or a JSON file.
        dropped: the rows that leave, with `audit_row`, `audit_score` and `audit_reason` besides.
        control: what is kept when as many rows are chosen at random, if asked for.
        summary: counts, and how much of each flag's attribution is left.
        plan: what was decided about every row.
    """

    kept: Any
    dropped: Any
    control: Any | None
    summary: dict[str, Any]
    plan: FilterPlan
    source: Source

    def save(self, path: str | Path, *, format: str | None = None, overwrite: bool = False) -> Path:
        """Write kept and dropped rows, the control, and a dataset card to the directory `path`, all or nothing.

        Args:
            path: made; the data in it is `kept` and `dropped` with the format's ending, `control` likewise.
            format: "jsonl", "parquet" or "dataset" (save_to_disk); by default the input's own.
            overwrite: replace what an earlier run wrote there.

        Raises:
            AuditError: `path` exists, is no directory of an earlier run, or cannot be written.
        """
        return write_filtered(
            self.source,
            self.plan,
            self.summary,
            Path(path),
            format,
            overwrite,
            with_control=self.control is not None,
        )


def filter_preferences(
    dataset: Source,
    audit: Audit,
    flags: FlagSet,
    strategy: str = "drop",
    *,
    score: str | Mapping[str, float] = "attribution",
    budget: float | int | None = None,
    threshold: float | None = None,
    quantile: float | None = None,
    control: bool = False,
    weight_column: str = "weight",
    on_bad_row: str = "stop",
    seed: int = 0,
) -> FilterResult:
    """Remove, flip or weight down the examples that teach flagged features.

    An example's score adds up, over the flags by their weights, what it does to the feature, in units of the root
    mean square over examples. Positive is what the flag objects to; rows at or below 0 are never touched.

    Args:
        dataset: the data that was audited, in any form.
        audit: of it.
        flags: at least one of them of the audit's dictionary.
        strategy: "drop"; "flip", chosen and rejected change places; "weight", a column with the weight at which the
            example would teach no more than the last one left alone; "resample", each is kept with that probability,
            for trainers that know no weights.
        score: "attribution" (what the loss asks for), "influence" (what a step does; needs an audit with a
            lookahead), "activation" (mean activation in chosen less rejected), or a mix as {name: weight}.
        budget: at most this many rows, or below 1 this share of them, those with the highest scores.
        threshold: rows with a score above it. One of budget, threshold and quantile must be given.
        quantile: rows with a score above this quantile of the scores, between 0 and 1.
        control: also choose as many rows at random.
        weight_column: for strategy "weight".
        on_bad_row: what to do with a row that is no pair: "stop", or "set_aside", which drops it with the reason.
        seed: of resampling and the control.

    Raises:
        AuditError: the audit is of another dataset, the flags are of another dictionary, a bad row, by its number;
            options that contradict each other.

    Example:

    ```python
    result = filter_preferences(dataset, audit, FlagSet.load("flags.yaml"), budget=0.05, control=True)
    trainer = DPOTrainer(..., train_dataset=result.kept)
    result.save("data/filtered")
    ```
    """
    settings = {
        "strategy": strategy,
        "score": score if isinstance(score, str) else dict(score),
        "budget": budget,
        "threshold": threshold,
        "quantile": quantile,
        "weight_column": weight_column,
        "on_bad_row": on_bad_row,
        "seed": seed,
    }
    own = flags.of(audit.dictionary)
    check_same_data(dataset, audit, weight_column if strategy == "weight" else None, on_bad_row)
    plan = plan_filter(audit, own, settings)
    chance = plan.control(seed) if control else None
    return FilterResult(
        kept=apply_plan(dataset, plan, weight_column),
        dropped=rows_that_leave(dataset, plan),
        control=None if chance is None else apply_plan(dataset, chance, weight_column),
        summary=summarize(audit, own, plan, chance),
        plan=plan,
        source=dataset,
    )


def check_same_data(dataset: Source, audit: Audit, new_column: str | None, on_bad_row: str) -> None:
    """Read the data once: is it what was audited?

    Raises:
        AuditError: it is not, by the first row that differs; a row is no pair and `on_bad_row` is "stop"; it has
            a column `new_column` already.
    """
    digests, check, count = audit.digests(), PairCheck(), 0
    for row in iterate_rows(dataset):
        problem = check(row)
        if problem and on_bad_row == "stop":
            raise AuditError(
                f"Row {row.index} of the dataset (counted from 0) {problem}; correct or remove it, or pass "
                "on_bad_row='set_aside' to move such rows to the dropped ones."
            )
        if count >= len(digests) or row_digest(row) != digests[count].tobytes():
            raise AuditError(
                f"The audit is of another dataset: it differs from row {count} on. Audit this dataset, or filter the one "
                "that was audited."
            )
        if new_column and row.columns is not None and new_column in row.columns:
            raise AuditError(f"The dataset has a column {new_column!r} already; pass another weight_column.")
        count += 1
    if count != len(digests):
        raise AuditError(
            f"The audit is of another dataset, with {len(digests)} rows where this one has {count}; audit this one."
        )


def plan_filter(audit: Audit, flags: Sequence[Flag], settings: Mapping[str, Any]) -> FilterPlan:
    """Decide about every row."""
    strategy = settings["strategy"]
    if strategy not in STRATEGIES:
        raise AuditError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    rows = audit.rows()
    score = np.full(audit.manifest["rows"], np.nan)
    score[rows] = example_scores(audit, flags, settings["score"])
    selected, cutoff = select(score, settings["budget"], settings["threshold"], settings["quantile"])
    action = np.full(len(score), "keep", dtype="<U6")
    weight = np.ones(len(score))
    if strategy in ("drop", "flip"):
        action[selected] = strategy
    else:
        weight[selected] = max(cutoff, 0.0) / score[selected]
        action[selected] = "weight"
    if strategy == "resample":
        drawn = np.random.default_rng(settings["seed"]).random(len(score))
        action[selected] = np.where(drawn[selected] < weight[selected], "keep", "drop")
        weight[:] = 1.0
    names = ", ".join(flag.name for flag in flags)
    reason = [
        f"score {score[row]:.4g} for {names}" if action[row] != "keep" else "" for row in range(len(score))
    ]
    for row, problem in audit.set_aside:
        action[row], reason[row] = "drop", problem
    return FilterPlan(
        action, score, weight, reason, {**settings, "flags": [dataclasses.asdict(flag) for flag in flags]}
    )


def example_scores(audit: Audit, flags: Sequence[Flag], score: str | Mapping[str, float]) -> np.ndarray:
    """How much each audited example does what the flags object to [n]."""
    mix = {score: 1.0} if isinstance(score, str) else dict(score)
    if not mix:
        raise AuditError(f"score is an empty mix; name at least one of {', '.join(SCORES)}.")
    features = [flag.feature for flag in flags]
    total = np.zeros(len(audit))
    for name, share in mix.items():
        if name not in SCORES:
            raise AuditError(
                f"score is {name!r}; choose among {', '.join(SCORES)}, or give a mix as {{name: weight}}."
            )
        values = _values(audit, name, features).astype(np.float64)
        size = np.sqrt((values**2).mean(0))
        values = np.divide(values, size, out=np.zeros_like(values), where=size > 0)
        for column, flag in enumerate(flags):
            total += share * flag.weight * flag.signed(values[:, column])
    return total


def _values(audit: Audit, name: str, features: Sequence[int]) -> np.ndarray:
    readers: dict[str, Callable[[Sequence[int]], np.ndarray]] = {
        "attribution": audit.contributions,
        "activation": audit.activation_gaps,
        "influence": audit.influence_of,
    }
    return readers[name](features)


def select(
    score: np.ndarray, budget: float | int | None, threshold: float | None, quantile: float | None
) -> tuple[np.ndarray, float]:
    """Rows to act on, in order, and the score of the last one left alone: those above it are acted on.

    Raises:
        AuditError: none or several of the three given, or one out of range.
    """
    given = [
        name
        for name, value in (("budget", budget), ("threshold", threshold), ("quantile", quantile))
        if value is not None
    ]
    if len(given) != 1:
        raise AuditError(
            f"{' and '.join(given) or 'Nothing'} given; give exactly one of budget, threshold and quantile."
        )
    known = score[~np.isnan(score)]
    if budget is not None:
        count = _count(budget, len(score))
        candidates = np.flatnonzero(score > 0)
        order = candidates[np.argsort(-score[candidates], kind="stable")]
        cutoff = float(score[order[count]]) if count < len(order) else 0.0
        return np.sort(order[:count]), cutoff
    if quantile is not None:
        if not 0 <= quantile < 1:
            raise AuditError(f"quantile is {quantile}; give a number from 0 to below 1.")
        threshold = float(np.quantile(known, quantile)) if len(known) else 0.0
    assert threshold is not None
    if math.isnan(threshold):
        raise AuditError("threshold is not a number; give one.")
    cutoff = max(threshold, 0.0)
    return np.flatnonzero(score > cutoff), cutoff


def _count(budget: float | int, rows: int) -> int:
    if isinstance(budget, bool) or not budget > 0 or (budget >= 1 and budget != int(budget)):
        raise AuditError(f"budget is {budget}; give a number of rows, or a share of them between 0 and 1.")
    if budget >= 1:
        return int(budget)
    return math.floor(budget * rows + 1e-9)


def summarize(
    audit: Audit, flags: Sequence[Flag], plan: FilterPlan, control: FilterPlan | None
) -> dict[str, Any]:
    """Counts, and each flag's attribution before and after (to first order, each example's part taken as it was)."""
    counts = {name: int((plan.action == name).sum()) for name in ("keep", "drop", "flip", "weight")}
    contributions = audit.contributions([flag.feature for flag in flags])
    rows = audit.rows()
    summary: dict[str, Any] = {
        "rows": len(plan),
        "kept": len(plan.kept),
        "dropped": len(plan.dropped),
        "flipped": counts["flip"],
        "weighted": counts["weight"],
        "set_aside": len(audit.set_aside),
        "flags": [],
    }
    for column, flag in enumerate(flags):
        part = contributions[:, column] * len(rows)
        entry = {"dictionary": flag.dictionary, "feature": flag.feature, "label": flag.label}
        entry["attribution_before"] = float(part.mean())
        entry["attribution_after"] = _remaining(part, plan, rows)
        if control is not None:
            entry["attribution_control"] = _remaining(part, control, rows)
        summary["flags"].append(entry)
    return summary


def _remaining(part: np.ndarray, plan: FilterPlan, rows: np.ndarray) -> float:
    action, weight = plan.action[rows], plan.weight[rows]
    factor = np.select([action == "drop", action == "flip"], [0.0, -1.0], weight)
    kept = (action != "drop").sum()
    return float((part * factor).sum() / kept) if kept else 0.0


# Doing it


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
            return load_from_disk(path)
        if path.suffix == ".parquet":
            return Dataset.from_parquet(str(path))
    return dataset


# Writing it


def write_filtered(
    source: Source,
    plan: FilterPlan,
    summary: Mapping[str, Any],
    path: Path,
    format: str | None,
    overwrite: bool,
    *,
    with_control: bool,
) -> Path:
    """See `FilterResult.save`. The directory appears under its name when it is complete, never before."""
    if path.exists() and not overwrite:
        raise AuditError(f"{path} exists already; choose another directory, or pass overwrite=True.")
    if path.exists() and not (path / "filter.json").is_file():
        raise AuditError(
            f"{path} was not written by a filter, so it is not overwritten; choose another directory."
        )
    writer = writer_for(source, format)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
        _fill(scratch, source, plan, summary, writer, with_control)
        _put_in_place(scratch, path)
    except OSError as error:
        raise AuditError(
            f"{path} could not be written ({error.strerror}); the input is untouched and nothing was put in place: make "
            "room or choose another directory."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _fill(
    scratch: Path,
    source: Source,
    plan: FilterPlan,
    summary: Mapping[str, Any],
    writer: Writer,
    with_control: bool,
) -> None:
    column = plan.settings["weight_column"]
    files = {
        "kept": writer.write(
            scratch / "kept",
            apply_plan(source, plan, column) if writer.whole else kept_rows(source, plan, column),
        ),
        "dropped": writer.write(
            scratch / "dropped", rows_that_leave(source, plan) if writer.whole else dropped_rows(source, plan)
        ),
    }
    if with_control:
        chance = plan.control(plan.settings["seed"])
        rows = apply_plan(source, chance, column) if writer.whole else kept_rows(source, chance, column)
        files[_CONTROL] = writer.write(scratch / _CONTROL, rows)
    plan.table()[["row", "action", "score", "weight", "reason"]].to_parquet(
        scratch / "decisions.parquet", index=False
    )
    record = {"settings": plan.settings, "summary": dict(summary), "files": files}
    (scratch / "filter.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (scratch / "README.md").write_text(dataset_card(record))


def _put_in_place(scratch: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.replace(old)
    try:
        scratch.replace(path)
    except OSError:
        if old.exists():
            old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def dataset_card(record: Mapping[str, Any]) -> str:
    """A README that says how the data was made, and how to make it again."""
    summary, settings = record["summary"], record["settings"]
    rule = next(
        f"{name} {settings[name]:g}"
        for name in ("budget", "threshold", "quantile")
        if settings[name] is not None
    )
    score = settings["score"] if isinstance(settings["score"], str) else json.dumps(settings["score"])
    command = [
        "trl-sae-audit filter --dataset DATA --audit AUDIT --flags flags.yaml",
        f"--strategy {settings['strategy']} --score {score} --{rule} --seed {settings['seed']}",
    ]
    flags = "\n".join(
        f"| {flag['dictionary']} | {flag['feature']} | {flag['label']} | {flag['attribution_before']:.4g} | "
        f"{flag['attribution_after']:.4g} |"
        for flag in summary["flags"]
    )
    files = "\n".join(
        f"  - split: {name}\n    path: {file}" for name, file in record["files"].items() if name != "dropped"
    )
    return f"""---
configs:
- config_name: default
  data_files:
{files}
tags:
- trl-sae-audit
- preference
---

# Preference data, filtered by what it teaches

Of {summary["rows"]} rows {summary["kept"]} are kept and {summary["dropped"]} dropped; {summary["flipped"]} of the kept
are flipped and {summary["weighted"]} weighted down. The dropped rows lie in `{record["files"]["dropped"]}` with the row's
number, its score and the reason; what was decided about every row in `decisions.parquet`.

| dictionary | feature | label | attribution before | after |
|---|---|---|---|---|
{flags}

Attribution: how strongly the mean loss's gradient up-weights the feature; positive = the data teaches it.

Made by [trl-sae-audit](https://pypi.org/project/trl-sae-audit/) from the flags in `filter.json`; to make it again:

```
{command[0]} \\
    {command[1]}
```
"""
