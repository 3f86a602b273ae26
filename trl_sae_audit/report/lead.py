"""The score that leads a table: what is known of generations, with its 95 % interval; attribution where nothing else is known.

What a model will generate is told by the drift in its generations, by the effect size that an audit predicts, and by selection, in
that order; attribution, what the loss asks of the layer, tells nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..audit.leading import known_scores, selection_in_standard_errors
from ..statistics import NORMAL_QUANTILE

SIGNIFICANT = 0.05
DRIFT = "generation_effect_size"


@dataclass(frozen=True)
class Lead:
    """A score that can lead.

    Attributes:
        name: its column.
        heading: of a table's column.
        up, down: headings of the features with the largest and the smallest values.
        meaning: a sentence that explains the number.
        unit: its unit and its sign, for a reader.
        summed: whether it adds up over the steps of a run, so that runs are compared per step.
    """

    name: str
    heading: str
    up: str
    down: str
    meaning: str
    unit: str
    summed: bool = False


LEADS = (
    Lead(
        DRIFT,
        "drift",
        "More in what the model generates",
        "Less in what the model generates",
        "Drift in generations: how far the feature has moved in what the model generates, against the start.",
        "In standard deviations over its answers; positive: the model writes more of it.",
    ),
    Lead(
        "effect_size",
        "effect size",
        "Training would strengthen most in generations",
        "Training would weaken most in generations",
        "Effect size: what one optimizer step on the data does to the feature in the model's own answers, predicted.",
        "In standard deviations over these answers; positive: the model will write more of it.",
    ),
    Lead(
        "selection",
        "selection",
        "Selected for most",
        "Selected against most",
        "Selection: the feature's activation in the responses that training makes more likely, less that in those it makes less likely. It "
        "predicts what the model will generate. Features are ordered by it in units of its standard error.",
        "In units of activation; positive: training makes answers with more of it likelier.",
        summed=True,
    ),
    Lead(
        "attribution",
        "attribution",
        "Pushed up most",
        "Pushed down most",
        "Attribution: the part of the descent direction that lies along the feature: what the loss asks of the layer, not a forecast.",
        "In units of the loss per unit of the layer's output; positive: the step strengthens the feature.",
        summed=True,
    ),
)
"""The first that is known leads."""


def known_leads(frame: pd.DataFrame) -> list[Lead]:
    """The scores that a table of features has any value of, the best first; an effect size that says nothing comes after selection, as in
    `Audit.ranking`."""
    names: list[str] = [*known_scores(frame)]
    if DRIFT in frame and bool(frame[DRIFT].notna().any()):
        names.insert(0, DRIFT)
    by_name = {lead.name: lead for lead in LEADS}
    return [by_name[name] for name in names]


def common_lead(frames: Sequence[pd.DataFrame]) -> Lead:
    """The best score that every table has."""
    names = [{lead.name for lead in known_leads(frame)} for frame in frames]
    return next((lead for lead in LEADS if all(lead.name in some for some in names)), LEADS[-1])


def read_lead(frame: pd.DataFrame, lead: Lead) -> pd.DataFrame:
    """A score in one form: value, its 95 % interval low to high, rank (the larger the earlier, −1 where unknown), q (NaN where there is
    no such test) and clear (beyond chance). The rows and their order are those of `frame`."""
    value = frame[lead.name].astype(float)
    q = np.full(len(frame), np.nan)
    rank = value.abs()
    if lead.name == DRIFT:
        unit = (value / frame["generation_drift"]).where(frame["generation_drift"] != 0)
        low, high = (frame[f"generation_drift_{end}"] * unit for end in ("low", "high"))
        clear = (low > 0) | (high < 0)
    elif lead.name == "effect_size":
        low, high = frame["effect_size_low"], frame["effect_size_high"]
        clear = (low > 0) | (high < 0)
        if "selection_q_value" in frame:
            q = frame["selection_q_value"].to_numpy(float)
            clear &= (q < SIGNIFICANT) & (frame["selection"] * value > 0)
    else:
        selects = lead.name == "selection"
        margin = NORMAL_QUANTILE * frame["selection_standard_error"] if selects else frame["margin"]
        low, high = value - margin, value + margin
        q = frame["selection_q_value" if selects else "q_value"].to_numpy(float)
        clear = pd.Series(q < SIGNIFICANT, index=frame.index)
        if selects:
            rank = selection_in_standard_errors(frame).abs()
    return pd.DataFrame(
        {
            "value": value,
            "low": low,
            "high": high,
            "rank": rank.fillna(-1.0),
            "q": q,
            "clear": clear.astype(bool),
        },
        index=frame.index,
    )
