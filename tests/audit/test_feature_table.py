"""What an audit's table is ordered by."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from trl_sae_audit.audit.feature_table import rank, rank_for_readers
from trl_sae_audit.audit.leading import known_scores
from trl_sae_audit.statistics import effects_tell

FEATURES = 200


def make_table(clear: int) -> pd.DataFrame:
    """Effects 1 to 200, of which `clear` have an interval without 0; selection in the other order."""
    effect = np.arange(1.0, FEATURES + 1)
    half = np.where(np.arange(FEATURES) < clear, 0.5, 1000.0)
    return pd.DataFrame(
        {
            "feature": np.arange(FEATURES),
            "attribution": 1.0,
            "effect_size": effect,
            "effect_size_low": effect - half,
            "effect_size_high": effect + half,
            "selection": effect[::-1] * effect,
            "selection_standard_error": effect,
        }
    )


@pytest.mark.parametrize(("clear", "leads"), [(5, "selection"), (6, "effect_size"), (200, "effect_size")])
def test_effects_lead_unless_fewer_are_told_from_0_than_half_of_what_chance_tells(clear, leads):
    table = make_table(clear)
    assert known_scores(table)[0] == leads
    assert rank(table)["feature"].iloc[0] == FEATURES - 1, "the table of numbers keeps its order"
    first = rank_for_readers(table)["feature"].iloc[0]
    assert first == (FEATURES - 1 if leads == "effect_size" else 0), (
        "selection in units of its standard error"
    )


def test_without_selection_or_without_a_lookahead_there_is_no_choice():
    table = make_table(0)
    plain = table.drop(columns=["selection", "selection_standard_error"])
    assert known_scores(plain)[0] == "effect_size"
    assert known_scores(table[["attribution", "selection", "selection_standard_error"]])[0] == "selection"
    assert known_scores(table[["attribution"]])[0] == "attribution"
    unknown = plain.assign(effect_size=np.nan, effect_size_low=np.nan, effect_size_high=np.nan)
    assert known_scores(unknown) == ["attribution"], "a score of no feature does not lead"


def test_features_without_an_interval_do_not_count():
    low = np.array([0.1] + [-1.0] * 38 + [np.nan] * 161)
    assert effects_tell(low, low + 1), "one of 39 is more than one in forty"
    low[-161:] = -1.0
    assert not effects_tell(low, low + 1), "one of 200 is not"
    assert not effects_tell(np.full(3, np.nan), np.full(3, np.nan))
