"""Which score of a table of features leads, as tables in the terminal and reports order it."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from ..statistics import effects_tell

Score = Literal["effect_size", "selection", "attribution"]


def known_scores(frame: pd.DataFrame) -> list[Score]:
    """Those of effect_size, selection and attribution that the table has any value of, the one that leads first.

    The effect size leads, unless its intervals say nothing (`statistics.effects_tell`): then it comes after selection.
    """
    order: list[Score] = ["effect_size", "selection", "attribution"]
    if "effect_size" in frame and not effects_tell(
        frame["effect_size_low"].to_numpy(float), frame["effect_size_high"].to_numpy(float)
    ):
        order = ["selection", "effect_size", "attribution"]
    return [name for name in order if name in frame and bool(frame[name].notna().any())]


def selection_in_standard_errors(frame: pd.DataFrame) -> pd.Series:
    """Selection by row, in units of its standard error; NaN where that is 0 or unknown."""
    error = frame["selection_standard_error"]
    return frame["selection"] / error.where(error > 0)
