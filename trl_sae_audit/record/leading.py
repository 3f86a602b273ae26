"""The score that leads a run's table of features: what the model generates now where it was looked at, else what the run selected
for, else attribution."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ..statistics import NORMAL_QUANTILE


@dataclass(frozen=True)
class Leading:
    """A score that can lead.

    Attributes:
        score: its column in `RunRecord.features`.
        heading: of a printed column.
        order: the column that orders by it, the largest in size first.
        meaning: a sentence that explains the number.
    """

    score: str
    heading: str
    order: str
    meaning: str

    def half_width(self, features: pd.DataFrame) -> pd.Series:
        """Half of the score's 95 % interval, by row."""
        if self.score == "generation_effect_size":
            drift = features["generation_drift"]
            unit = (features[self.score] / drift).where(drift != 0)
            return (features["generation_drift_high"] - features["generation_drift_low"]) / 2 * unit
        error = "standard_error" if self.score == "attribution" else f"{self.score}_standard_error"
        return NORMAL_QUANTILE * features[error]


LEADINGS = (
    Leading(
        "generation_effect_size",
        "drift",
        "generation_effect_size",
        "drift: how far the feature has moved in what the model generates, against the start, in standard deviations over its answers.",
    ),
    Leading(
        "selection",
        "selection",
        "selection_z",
        "selection: what the run selected for, by the responses it made more and less likely, summed over the run; + for the feature, − "
        "against it. It says more than attribution about what the model will write.",
    ),
    Leading(
        "attribution",
        "attribution",
        "attribution",
        "attribution: what the loss asked of the residual stream, summed over the run; no forecast of what the model will write.",
    ),
)
"""The first that is known leads."""


def known_leadings(features: pd.DataFrame) -> list[Leading]:
    """The scores that a table of a run's features has any value of, the best first."""
    return [each for each in LEADINGS if each.score in features and bool(features[each.score].notna().any())]
