"""Drop, flip or weight the examples of a preference dataset by what an audit says they teach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.opener import DatasetLike, iterate_rows
from ..data.preferences import PairCheck, row_digest
from ..errors import AuditError
from ..flags import Flag, FlagSet
from ..statistics import NORMAL_QUANTILE
from .check import FilterCheck, predict_again
from .output import write_filtered
from .plan import FilterPlan, Strategy, plan_filter
from .rows import apply_plan, select_dropped
from .scores import ScoreName, Weighting
from .writers import Format

if TYPE_CHECKING:
    import pandas as pd

    from ..audit.result import Audit


@dataclass(frozen=True)
class FilterResult:
    """What `filter_preferences` made.

    Attributes:
        kept: the kept rows, in order and with every column; of the kind of the input, or a list of rows
            for a list or a JSON file.
        dropped: the dropped rows, with `audit_row`, `audit_score` and `audit_reason` besides.
        control: what is kept when as many rows are chosen at random, if asked for.
        summary: counts, how much of each flag's disparity and attribution is left, and what `check` found.
        plan: what was decided about every row.
        check: what the kept rows are predicted to teach, every feature beside what all rows would; None if it was
            left out, or the audit has no lookahead at hand.
    """

    kept: Any
    dropped: Any
    control: Any | None
    summary: dict[str, Any]
    plan: FilterPlan
    source: DatasetLike
    check: FilterCheck | None = None

    def save(self, path: str | Path, *, format: Format | None = None, overwrite: bool = False) -> Path:
        """Write kept and dropped rows, the control, and a dataset card to the directory `path`, all or nothing.

        Args:
            path: made; the data in it is `kept` and `dropped` with the format's ending, `control` likewise.
            format: "jsonl", "parquet" or "dataset" (save_to_disk); by default the input's own.
            overwrite: replace what an earlier run wrote there.

        Raises:
            AuditError: `path` exists, is no directory of an earlier run, or cannot be written.
        """
        return write_filtered(self.source, self.plan, self.summary, Path(path), format, overwrite)


def filter_preferences(
    dataset: DatasetLike,
    audit: Audit,
    flags: FlagSet,
    strategy: Strategy = "drop",
    *,
    score: ScoreName | Mapping[str, float] = "max_activation",
    weights: Weighting = "fit",
    budget: float | Literal["balance"] | None = None,
    threshold: float | None = None,
    quantile: float | None = None,
    control: bool = False,
    weight_column: str = "weight",
    on_bad_row: Literal["stop", "set_aside"] = "stop",
    check: bool = True,
    seed: int = 0,
) -> FilterResult:
    """Remove, flip or weight down the examples that teach flagged features.

    An example's score adds up, over the flags, what it does to the feature. Positive is what the flag objects to; rows
    at or below 0 are never touched. By default the score is the log-odds by which the flagged features explain that this
    answer was preferred, and as many rows are dropped as make them explain nothing in the rest. Then a step on the rest is
    predicted, where the audit was made in this process with a lookahead.

    Args:
        dataset: the data that was audited, in any form.
        audit: of it.
        flags: at least one of them of the audit's dictionary.
        strategy: "drop"; "flip", chosen and rejected change places; "resample", as many rows as there were, some left
            out and others repeated, in proportion to their weights; "weight", a column with these weights, for a loss of
            your own: no trainer of TRL reads one.
        score: "max_activation" (of the largest activation in chosen less that in rejected), "activation" (of the mean), "attribution"
            (what the loss asks for along the feature, at all tokens), "activation_attribution" (what it
            asks for where the feature is active), "influence" (what a step does; needs an audit with a lookahead), or a mix
            as {name: weight}.
        weights: "fit", by what explains best which answer was preferred; "flags", each flag by its own weight, in units
            of its root mean square over examples.
        budget: "balance", the default where threshold and quantile are not given: of rows that score s the share
            exp(−c·s) stays, with the c for which the scores of the rest add up to 0, so that rows for and against the flags are
            equally frequent; see `kept_shares`. Or at most this many rows, below 1 this share of them, those with
            the highest scores.
        threshold: rows with a score above it.
        quantile: rows with a score above this quantile of the scores, between 0 and 1.
        control: also choose as many rows at random.
        weight_column: for strategy "weight".
        on_bad_row: what to do with a row that is no pair: "stop", or "set_aside", which drops it with the reason.
        check: predict again what a step on the kept rows does, at the audit's own prompts and in its own sampled answers.
        seed: of the control.

    Raises:
        AuditError: the audit is of another dataset; the flags are of another dictionary, or object to the opposite of what the
            data teach; nothing would be kept; a bad row, by its number; options that contradict each other.

    Example:

    ```python
    result = filter_preferences(dataset, audit, FlagSet.load("flags.yaml"), control=True)
    print(result.check)
    trainer = DPOTrainer(..., train_dataset=result.kept)
    result.save("data/filtered")
    ```
    """
    if budget is None and threshold is None and quantile is None:
        budget = "balance"
    settings = {
        "dataset": str(dataset) if isinstance(dataset, (str, Path)) else None,
        "audit": str(audit.directory),
        "strategy": strategy,
        "score": score if isinstance(score, str) else dict(score),
        "weights": weights,
        "budget": budget,
        "threshold": threshold,
        "quantile": quantile,
        "control": control,
        "weight_column": weight_column,
        "on_bad_row": on_bad_row,
        "check": check,
        "seed": seed,
    }
    own = flags.of(audit.dictionary)
    check_same_data(dataset, audit, weight_column if strategy == "weight" else None, on_bad_row)
    check_directions(audit, own)
    plan = plan_filter(audit, own, settings)
    chance = plan.control(seed) if control else None
    summary = summarize(audit, own, plan, chance)
    predicted = predict_again(audit, dataset, own, plan) if check else None
    if predicted is not None:
        summary["check"] = predicted.to_dict()
    return FilterResult(
        kept=apply_plan(dataset, plan, weight_column),
        dropped=select_dropped(dataset, plan),
        control=None if chance is None else apply_plan(dataset, chance, weight_column),
        summary=summary,
        plan=plan,
        source=dataset,
        check=predicted,
    )


def check_directions(audit: Audit, flags: Sequence[Flag]) -> None:
    """Refuse a flag that objects to the opposite of what the data teach: to filter by it would teach more of that.

    Raises:
        AuditError: by an effect beyond chance the data weaken a feature flagged "up", or strengthen one flagged "down".
    """
    found = audit.beyond_chance().set_index("feature")
    for flag in flags:
        if flag.feature not in found.index or flag.direction == "both":
            continue
        row: Any = found.loc[flag.feature]
        lead = _telling(row)
        if (row[lead] > 0) == (flag.direction == "up"):
            continue
        bounds = f" [{row[f'{lead}_low']:+.2g}, {row[f'{lead}_high']:+.2g}]" if f"{lead}_low" in row else ""
        does, not_meant, other = (
            ("weaken", "strengthened", "down") if flag.direction == "up" else ("strengthen", "weakened", "up")
        )
        raise AuditError(
            f"Flag {flag.name!r} (feature {flag.feature}, direction {flag.direction}) says that the feature should not be {not_meant}, "
            f"but these data {does} it: {lead.replace('_', ' ')} {row[lead]:+.2g}{bounds}. If that is what should not happen, set "
            f"its direction to {other}; otherwise remove the flag, because there is nothing to filter for it."
        )


def _telling(row: pd.Series) -> str:
    """The score that says which way the data push a feature: its effect where that is beyond chance, else what they select for."""
    if row.get("effect_size_low", math.nan) > 0 or row.get("effect_size_high", math.nan) < 0:
        return "effect_size"
    return "selection" if "selection" in row else "attribution"


def check_same_data(
    dataset: DatasetLike, audit: Audit, new_column: str | None, on_bad_row: Literal["stop", "set_aside"]
) -> None:
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
    """Counts; the mean of the score that decided; and of each flag the disparity, with its 95 % interval, and the attribution, before
    and after (to first order, each example's part taken as it was)."""
    rows = audit.rows()
    features = [flag.feature for flag in flags]
    contributions = audit.contributions(features)
    presence = (
        audit.activation_gaps(features, "active") if audit.manifest["settings"]["activations"] else None
    )
    plans = {"before": None, "after": plan} | ({} if control is None else {"control": control})
    factors = {when: np.ones(len(rows)) if one is None else one.factor[rows] for when, one in plans.items()}
    summary: dict[str, Any] = {
        "rows": len(plan),
        "kept": len(plan.kept),
        "dropped": len(plan.dropped),
        "flipped": int((plan.action == "flip").sum()),
        "weighted": int((plan.action == "weight").sum()),
        "repeated": int((plan.copies > 1).sum()),
        "set_aside": len(audit.set_aside),
        "score": {when: _mean(plan.score[rows], factor) for when, factor in factors.items()},
        "flags": [],
    }
    for column, flag in enumerate(flags):
        entry: dict[str, Any] = {
            "dictionary": flag.dictionary,
            "feature": flag.feature,
            "label": flag.label,
            "words": flag.words,
            "direction": flag.direction,
        }
        for when, factor in factors.items():
            if presence is not None:
                values = presence[:, column].astype(np.float64)
                entry[f"disparity_{when}"] = _mean(values, factor)
                entry[f"disparity_{when}_margin"] = NORMAL_QUANTILE * _standard_error(values, factor)
            entry[f"attribution_{when}"] = _mean(contributions[:, column] * len(rows), factor)
        summary["flags"].append(entry)
    return summary


def _mean(values: np.ndarray, factor: np.ndarray) -> float:
    """Mean over what is kept; `factor` is how much each example counts in it, below 0 if flipped [n]."""
    return float((values * factor).sum() / max(np.abs(factor).sum(), 1e-300))


def _standard_error(values: np.ndarray, factor: np.ndarray) -> float:
    """Of `_mean`, over the distinct examples that are kept."""
    size = np.abs(factor)
    off = size * (np.sign(factor) * values - _mean(values, factor))
    return float(np.sqrt((off**2).sum()) / max(size.sum(), 1e-300))
