"""How every feature moved over a run: what a map over time is drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..attribution.totals import FeatureTotals
from .reader import RunRecord


@dataclass(frozen=True)
class OverTime:
    """A score of every feature over a run.

    Attributes:
        bins: (first, last) step of each [bins, 2].
        values: mean a step, or the level at the end of the bin, [bins, F]; NaN where it is not known.
        level: which of the two.
    """

    bins: np.ndarray
    values: np.ndarray
    level: bool = False


def read_over_time(record: RunRecord, dictionary: str, totals: FeatureTotals) -> dict[str, OverTime]:
    """Of a dictionary: "generation_drift", in standard deviations over answers; "selection"; "activation" in the rollouts of an on-policy run,
    against the first of them; and "attribution": what the run recorded of these.

    Args:
        record: of the run.
        dictionary: its name.
        totals: of this dictionary, `record.totals`.
    """
    found = {}
    drift = record.drift_effects(dictionary)
    if drift is not None:
        steps = drift.index.to_numpy()
        bins = np.stack([np.concatenate([[0], steps[:-1]]) + 1, steps], axis=1)
        values = np.full((len(steps), totals.n_features), np.nan)
        values[:, drift.columns.to_numpy()] = drift.to_numpy()
        found["generation_drift"] = OverTime(bins, values, level=True)
    maps = {name: each.curriculum for name, each in totals.scores.items()} | totals.rollouts
    for name in ("selection", "activation", "attribution"):
        if name in maps:
            frame = maps[name].frame()
            bins, values = np.array(frame.index.tolist()).reshape(-1, 2), frame.to_numpy()
            level = name == "activation"
            found[name] = OverTime(bins, values - values[:1] if level else values, level)
    return found
