"""The columns that a reader of a run's tables counts on."""

from pathlib import Path

import pandas as pd
from pandas.api.types import infer_dtype, is_numeric_dtype

from ..errors import AuditError
from .contexts import CONTEXTS, WORDS

WEIGHTS = "trained_weights"
"""The table of some weights that a run ended with, see `models.weight_sample`."""
OF_THE_END = (WORDS, WEIGHTS)
"""Tables that are written when a run ends; a run that goes on has none of an earlier end."""
_NUMBERS = {
    CONTEXTS: ("step", "feature", "activation"),
    WORDS: ("step", "feature"),
    WEIGHTS: ("step", "place", "value"),
    "generation_drift": ("step", "feature", "drift", "low", "high"),
    "generation_features": ("feature", "spread"),
}
_TEXTS = {
    "steps": ("dictionary",),
    CONTEXTS: ("dictionary", "source", "prompt", "before", "at", "after"),
    WORDS: ("dictionary", "words"),
    WEIGHTS: ("parameter",),
    "generation_drift": ("dictionary",),
    "generation_features": ("dictionary",),
}


def check_columns(rows: pd.DataFrame, name: str, directory: Path) -> None:
    """Refuse, with an AuditError, a table that lacks a column or has one of another type."""
    if not len(rows):
        return
    wrong = [each for each in _NUMBERS.get(name, ()) if each not in rows or not is_numeric_dtype(rows[each])]
    wrong += [
        each
        for each in _TEXTS.get(name, ())
        if each not in rows or infer_dtype(rows[each], skipna=False) != "string"
    ]
    if wrong:
        raise AuditError(
            f"Table {name!r} of the record in {directory} has no column {wrong[0]!r} as it should be; read it with the release that "
            "wrote it, or restore it from a copy."
        )
