"""Runs side by side: how the models behave and what the losses pushed, with intervals of the differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd

from ..outcomes import Outcome
from .lead import Lead, common_lead, read_lead
from .sources import ReportSource, View

MOST_FEATURES = 8


@dataclass(frozen=True)
class Difference:
    """A difference and its 95 % interval, whose ends are NaN if there is none."""

    estimate: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def unclear(self) -> bool:
        """Whether there is an interval and it contains 0."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Measure:
    """One measure in every run.

    Attributes:
        before: of the initial model; None if it was not measured.
        after: of each source; None if it was not measured.
        differences: of each source from the first; None if either is missing.
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
class FeatureValue:
    """A feature in one run: the leading score with its 95 % interval, and the attribution; sums over a run are per step.

    Attributes:
        clear: whether the score is beyond chance.
    """

    estimate: float
    low: float
    high: float
    clear: bool
    attribution: float
    attribution_margin: float

    @property
    def rises(self) -> bool:
        """Whether the feature clearly becomes more frequent."""
        return self.clear and self.estimate > 0

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class FeatureRow:
    """One feature in every run.

    Attributes:
        lead: the score that is compared.
        values: of each source; None where it has not the dictionary.
        differences: of each source from the first; None where one of the two is missing.
    """

    feature: int
    label: str
    words: str
    lead: Lead
    values: list[FeatureValue | None]
    differences: list[Difference | None]

    @property
    def rises(self) -> bool:
        """Whether the feature rises in any run."""
        return any(value is not None and value.rises for value in self.values)

    @property
    def rises_more(self) -> bool:
        """Whether it rises in a later run, and clearly more than in the first: where the pressure may have gone."""
        return any(
            value is not None and value.rises and gap is not None and gap.low > 0
            for value, gap in zip(self.values, self.differences, strict=True)
        )


def compare_outcomes(sources: Sequence[ReportSource]) -> list[Measure]:
    """Every measure that a source has, in the order of the sources."""
    first_of: dict[str, Outcome] = {}
    for source in sources:
        for outcome in source.outcomes:
            first_of.setdefault(outcome.measure, outcome)
    return [_compare_measure(name, first, sources) for name, first in first_of.items()]


def _compare_measure(name: str, first: Outcome, sources: Sequence[ReportSource]) -> Measure:
    def find(source: ReportSource, stage: str) -> Outcome | None:
        return next((each for each in source.outcomes if (each.measure, each.stage) == (name, stage)), None)

    before = next((outcome for source in sources if (outcome := find(source, "before"))), None)
    after = [find(source, "after") for source in sources]
    return Measure(
        first.name,
        first.wanted,
        first.unit,
        before,
        after,
        [_subtract_outcomes(outcome, after[0]) for outcome in after],
        _subtract_outcomes(after[0], before),
    )


def _subtract_outcomes(a: Outcome | None, b: Outcome | None) -> Difference | None:
    if a is None or b is None or a is b:
        return None
    return subtract_estimates(a.estimate, a.low, a.high, b.estimate, b.low, b.high)


def subtract_estimates(
    a: float, a_low: float | None, a_high: float | None, b: float, b_low: float | None, b_high: float | None
) -> Difference:
    """a − b, with the interval that follows from those of a and b if they are independent: square and add the distances
    (Newcombe 1998 for rates; Zou & Donner 2008, MOVER, in general)."""
    if a_low is None or a_high is None or b_low is None or b_high is None:
        return Difference(a - b, math.nan, math.nan)
    return Difference(
        a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)
    )


def compare_features(sources: Sequence[ReportSource], most: int = MOST_FEATURES) -> list[FeatureRow]:
    """Compare features of the first source's first dictionary in every source that uses it. Empty if no other does.

    First the features that are watched in a source. Then, where the score tells what is generated, all others that rise: those first that
    rise in a later source clearly more than in the first, because pressure that is taken off one feature may move to another. Then the
    largest, to make at least `most`. Within each of these, the largest in any source first.
    """
    main = sources[0].views[0]
    views = [find_view(source, main) for source in sources]
    known = [view for view in views if view is not None]
    if len(known) < 2:
        return []
    lead = common_lead([view.features for view in known])
    watched: dict[int, str] = {}
    for view in known:
        for label, feature in view.watched.items():
            watched.setdefault(feature, label)
    tables = [None if view is None else _per_step(view, lead) for view in views]
    rank = np.max([table["rank"].to_numpy() for table in tables if table is not None], axis=0)
    largest = [int(feature) for feature in np.argsort(-rank, kind="stable")]
    words = [
        next(filter(None, each), "") for each in zip(*(view.features["words"] for view in known), strict=True)
    ]
    rows = {
        feature: _compare_feature(feature, watched.get(feature, ""), words[feature], lead, tables)
        for feature in largest
    }
    chosen = [feature for feature in largest if feature in watched]
    if lead.name != "attribution":
        chosen += [feature for feature in largest if rows[feature].rises_more]
        chosen += [feature for feature in largest if rows[feature].rises]
    chosen = list(dict.fromkeys(chosen))
    rest = (feature for feature in largest if feature not in set(chosen))
    return [rows[feature] for feature in [*chosen, *islice(rest, max(0, most - len(chosen)))]]


def find_view(source: ReportSource, main: View) -> View | None:
    """The source's view of the same dictionary as `main`, recognised by its content hash."""
    return next(
        (view for view in source.views if view.described["identity"] == main.described["identity"]), None
    )


def _per_step(view: View, lead: Lead) -> pd.DataFrame:
    table = read_lead(view.features, lead)
    if lead.summed:
        table[["value", "low", "high"]] /= view.steps
    return table.assign(
        attribution=view.features["attribution"].to_numpy() / view.steps,
        attribution_margin=view.features["margin"].to_numpy() / view.steps,
    )


def _compare_feature(
    feature: int, label: str, words: str, lead: Lead, tables: Sequence[pd.DataFrame | None]
) -> FeatureRow:
    values = [None if table is None else _feature_value(table, feature) for table in tables]
    first = values[0]
    differences = [
        None
        if place == 0 or value is None or first is None
        else subtract_estimates(value.estimate, value.low, value.high, first.estimate, first.low, first.high)
        for place, value in enumerate(values)
    ]
    return FeatureRow(feature, label, words, lead, values, differences)


def _feature_value(table: pd.DataFrame, feature: int) -> FeatureValue:
    row = table.iloc[feature]
    value, low, high, attribution, margin = (
        float(row[name]) for name in ("value", "low", "high", "attribution", "attribution_margin")
    )
    return FeatureValue(value, low, high, bool(row["clear"]), attribution, margin)
