"""Contexts of features in a run record: each feature's strongest places, of all that the run wrote."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..saes.words import lines_of

CONTEXTS, WORDS = "contexts", "words"
COLUMNS = ("feature", "source", "step", "activation", "prompt", "before", "at", "after")
_KEPT = 8


def strongest_contexts(rows: pd.DataFrame, dictionary: str) -> pd.DataFrame:
    """The strongest places of each feature of a dictionary, by feature, the strongest first: the columns of `COLUMNS`."""
    own = rows[rows["dictionary"] == dictionary]
    own = own.iloc[np.lexsort((own["step"], -own["activation"], own["feature"]))]
    return own[own.groupby("feature").cumcount() < _KEPT].reset_index(drop=True)[list(COLUMNS)]


def words_table(rows: pd.DataFrame, step: int) -> dict[str, list]:
    """What the record keeps of the contexts' words: columns step, dictionary, feature, words."""
    table: dict[str, list] = {"step": [], "dictionary": [], "feature": [], "words": []}
    for dictionary in rows["dictionary"].unique():
        lines = lines_of(strongest_contexts(rows, dictionary))
        table["step"] += [step] * len(lines)
        table["dictionary"] += [dictionary] * len(lines)
        table["feature"] += lines
        table["words"] += lines.values()
    return table


def feature_words(contexts: pd.DataFrame, words: pd.DataFrame | None, dictionary: str) -> dict[int, str]:
    """Feature → its words: those that were kept, unless contexts came in since."""
    if words is not None and len(words) and words["step"].max() >= contexts["step"].max():
        own = words[(words["dictionary"] == dictionary) & (words["step"] == words["step"].max())]
        return dict(zip(own["feature"].tolist(), own["words"].tolist(), strict=True))
    return lines_of(strongest_contexts(contexts, dictionary))
