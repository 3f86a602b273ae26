"""Prune, flip or weight a preference dataset by what an audit says its examples teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import AuditError
from .filter_output import write_filtered
from .filter_plan import FilterPlan, plan_filter
from .filter_rows import apply_plan, rows_that_leave
from .flags import Flag, FlagSet
from .preferences import PairCheck, Source, iterate_rows, row_digest

if TYPE_CHECKING:
    from .audit_result import Audit


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
    weights: str = "flags",
    budget: float | int | str | None = None,
    threshold: float | None = None,
    quantile: float | None = None,
    control: bool = False,
    weight_column: str = "weight",
    on_bad_row: str = "stop",
    seed: int = 0,
) -> FilterResult:
    """Remove, flip or weight down the examples that teach flagged features.

    An example's score adds up, over the flags, what it does to the feature. Positive is what the flag objects to; rows
    at or below 0 are never touched.

    Args:
        dataset: the data that was audited, in any form.
        audit: of it.
        flags: at least one of them of the audit's dictionary.
        strategy: "drop"; "flip", chosen and rejected change places; "weight", a column with the weight at which the
            example would teach no more than the last one left alone; "resample", each is kept with that probability,
            for trainers that know no weights.
        score: "attribution" (what the loss asks for along the feature, at all tokens), "activation_attribution" (what it
            asks for where the feature is active), "influence" (what a step does; needs an audit with a lookahead),
            "activation" (mean activation in chosen less rejected), "max_activation" (of the largest in each), or a mix
            as {name: weight}.
        weights: "flags", each flag by its own weight, in units of its root mean square over examples; "fit", by what
            explains best which answer was preferred.
        budget: at most this many rows, or below 1 this share of them, those with the highest scores. "balance": as few
            as it takes until the scores of the rest add up to no more than 0, so that the rest does not teach what was
            flagged; with "weight" and "resample" the level at which they do.
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
        "weights": weights,
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


def summarize(
    audit: Audit, flags: Sequence[Flag], plan: FilterPlan, control: FilterPlan | None
) -> dict[str, Any]:
    """Counts; the mean of the score that decided, and of each flag's attribution, before and after (to first order, each
    example's part taken as it was)."""
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
        "score": _before_and_after(plan.score[rows], plan, control, rows),
        "flags": [],
    }
    for column, flag in enumerate(flags):
        part = contributions[:, column] * len(rows)
        left = _before_and_after(part, plan, control, rows)
        entry = {"dictionary": flag.dictionary, "feature": flag.feature, "label": flag.label}
        summary["flags"].append(entry | {f"attribution_{when}": value for when, value in left.items()})
    return summary


def _before_and_after(
    part: np.ndarray, plan: FilterPlan, control: FilterPlan | None, rows: np.ndarray
) -> dict[str, float]:
    """Mean over the examples of something each has a part in [n]: "before", "after", and of the "control"."""
    left = {"before": float(part.mean()), "after": _remaining(part, plan, rows)}
    return left if control is None else left | {"control": _remaining(part, control, rows)}


def _remaining(part: np.ndarray, plan: FilterPlan, rows: np.ndarray) -> float:
    action, weight = plan.action[rows], plan.weight[rows]
    factor = np.select([action == "drop", action == "flip"], [0.0, -1.0], weight)
    kept = (action != "drop").sum()
    return float((part * factor).sum() / kept) if kept else 0.0
