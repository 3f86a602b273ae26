"""Runs side by side: what the models do, and what the losses asked for, with intervals of the differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..outcomes import Outcome
from .sources import Source, View

MOST_FEATURES = 8


@dataclass(frozen=True)
class Difference:
    """A difference and its 95 % interval; NaN ends where there is none."""

    estimate: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def unclear(self) -> bool:
        """Whether there is an interval, and 0 lies in it."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Measure:
    """One measure in every run.

    Attributes:
        before: of the model the runs began with; None if nobody measured it.
        after: of each source; None where it was not measured.
        differences: of each source from the first; None where one of the two is missing.
    """

    name: str
    wanted: str
    unit: str
    before: Outcome | None
    after: list[Outcome | None]
    differences: list[Difference | None]
    change: Difference | None

    @property
    def all(self) -> list[Outcome]:
        return [outcome for outcome in (self.before, *self.after) if outcome is not None]


@dataclass(frozen=True)
class FeatureRow:
    """One feature in every run: attribution per step (per audit: of the mean loss) and half its interval."""

    feature: int
    label: str
    values: list[tuple[float, float] | None]
    differences: list[Difference | None]


def compare_outcomes(sources: Sequence[Source]) -> list[Measure]:
    """Every measure that a source has, in the order of the sources."""
    found: dict[str, Outcome] = {}
    for source in sources:
        for outcome in source.outcomes:
            found.setdefault(outcome.measure, outcome)
    return [_measure(name, first, sources) for name, first in found.items()]


def _measure(name: str, first: Outcome, sources: Sequence[Source]) -> Measure:
    def of(source: Source, stage: str) -> Outcome | None:
        return next((one for one in source.outcomes if (one.measure, one.stage) == (name, stage)), None)

    before = next((found for source in sources if (found := of(source, "before"))), None)
    after = [of(source, "after") for source in sources]
    return Measure(
        first.name,
        first.wanted,
        first.unit,
        before,
        after,
        [_outcome_difference(one, after[0]) for one in after],
        _outcome_difference(after[0], before),
    )


def _outcome_difference(one: Outcome | None, other: Outcome | None) -> Difference | None:
    if one is None or other is None or one is other:
        return None
    return difference_of_estimates(one.estimate, one.low, one.high, other.estimate, other.low, other.high)


def difference_of_estimates(
    a: float, a_low: float | None, a_high: float | None, b: float, b_low: float | None, b_high: float | None
) -> Difference:
    """a − b with the interval that follows from those of a and b, taken as independent: square and add the distances
    (Newcombe 1998 for rates; Zou & Donner 2008, MOVER, for anything)."""
    if a_low is None or a_high is None or b_low is None or b_high is None:
        return Difference(a - b, math.nan, math.nan)
    return Difference(
        a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)
    )


def compare_features(sources: Sequence[Source], most: int = MOST_FEATURES) -> list[FeatureRow]:
    """Features of the first source's first dictionary in every source that has the same one; empty if none other has.

    All that are watched in a source, then as many others as make `most`, each the largest |attribution| in any source first.
    """
    main = sources[0].views[0]
    views = [view_like(source, main) for source in sources]
    if sum(view is not None for view in views) < 2:
        return []
    watched: dict[int, str] = {}
    for view in views:
        for label, feature in view.watched.items() if view else ():
            watched.setdefault(feature, label)
    size = np.max([np.abs(view.features["per_step"].to_numpy()) for view in views if view], axis=0)
    largest = [int(feature) for feature in np.argsort(-np.nan_to_num(size), kind="stable")]
    first = [feature for feature in largest if feature in watched] if watched else []
    rest = [feature for feature in largest[: most + len(first)] if feature not in watched]
    chosen = [*first, *rest[: max(0, most - len(first))]]
    return [_feature_row(feature, watched.get(feature, ""), views) for feature in chosen]


def view_like(source: Source, main: View) -> View | None:
    """The source's view of the very dictionary that `main` is of, known by its content."""
    return next(
        (view for view in source.views if view.described["identity"] == main.described["identity"]), None
    )


def _feature_row(feature: int, label: str, views: Sequence[View | None]) -> FeatureRow:
    values: list[tuple[float, float] | None] = []
    for view in views:
        row = None if view is None else view.features.iloc[feature]
        values.append(None if row is None else (float(row["per_step"]), float(row["per_step_margin"])))
    differences: list[Difference | None] = []
    for place, value in enumerate(values):
        first = values[0]
        if place == 0 or value is None or first is None:
            differences.append(None)
            continue
        half = math.hypot(value[1], first[1])
        gap = value[0] - first[0]
        differences.append(Difference(gap, gap - half, gap + half))
    return FeatureRow(feature, label, values, differences)
