"""An audit's table of features: statistics computed once and kept, predictions of the lookahead, and their order."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd

from ..io.manifest import damaged, reading
from ..io.tables import read_frame
from ..saes.dictionary import FeatureDictionary
from .answers_file import read_groups
from .content import FAMILIES, FEATURES, LOOKAHEAD
from .contexts import write_frame
from .families import find_families
from .leading import known_scores, selection_in_standard_errors
from .prompt_groups import by_prompt
from .statistics import ResamplingConfig, feature_statistics
from .store import AuditStore

PREDICTIONS = (
    "effect_size",
    "effect_size_low",
    "effect_size_high",
    "predicted_change_in_generations",
    "predicted_frequency_change",
    "generation_activation",
    "generation_frequency",
    "predicted_change",
    "probe_activation",
    "unrolled_change",
    "unrolled_change_in_generations",
)
"""What a lookahead adds to the table of features, as far as it was asked for."""
_SIDE_COLUMNS = ("", "_active")
_ALWAYS = (
    "dictionary", "feature", "attribution", "standard_error", "p_value", "q_value", "share", "lift", "length_q_value"
)  # fmt: skip


def known_statistics(store: AuditStore, dictionary: FeatureDictionary) -> pd.DataFrame:
    """One row a feature: the statistics, read from the audit's file, or computed and written there.

    Raises:
        AuditError: the file is damaged.
    """
    path = store.directory / FEATURES
    if path.is_file():
        return _read(path, dictionary)
    settings = ResamplingConfig(seed=store.manifest["settings"]["seed"])
    groups = read_groups(store)
    if groups is None:
        frame = feature_statistics(store.parts, dictionary, store.manifest["examples"], settings)
    else:
        whole = by_prompt(store.parts(), groups)
        frame = feature_statistics(lambda: [whole], dictionary, len(whole.row), settings)
    frame = frame.rename(columns=_side_names(store.manifest["loss"]["sides"]))
    frame.insert(0, "dictionary", dictionary.name)
    content = io.BytesIO()
    frame.to_parquet(content, index=False, write_page_checksum=True)
    store.write(FEATURES, content.getvalue())
    return frame


def _read(path: Path, dictionary: FeatureDictionary) -> pd.DataFrame:
    with reading(path):
        frame = read_frame(path, rows=dictionary.d_sae, columns=_ALWAYS)
        numbers = frame["feature"].to_numpy()
        if numbers.dtype != np.int64 or (np.sort(numbers) != np.arange(len(numbers))).any():
            raise ValueError("its features are not those of the dictionary")
        if "selection" in frame and not {"selection_standard_error", "selection_q_value"} <= set(frame):
            raise ValueError("it has selection without its standard error or q-value")
        texts = frame.drop(columns="dictionary").select_dtypes(exclude="number")
        if len(texts.columns):
            raise ValueError(f"its column {texts.columns[0]!r} is not of numbers")
    return frame.assign(dictionary=dictionary.name)


def _side_names(sides: list[str]) -> dict[str, str]:
    return {
        f"{generic}{suffix}": f"{name}{suffix}"
        for generic, name in zip(("positive", "negative"), sides, strict=True)
        for suffix in _SIDE_COLUMNS
    }


def add_predictions(store: AuditStore, frame: pd.DataFrame) -> pd.DataFrame:
    """The same table with what the lookahead predicted, in place; without a lookahead as it is.

    Raises:
        AuditError: the lookahead's file is damaged.
    """
    if not store.has(LOOKAHEAD):
        return frame
    order = frame["feature"].to_numpy()
    arrays, _ = store.read_arrays(LOOKAHEAD)
    for place, name in enumerate(name for name in PREDICTIONS if name in arrays):
        if arrays[name].shape != order.shape:
            raise damaged(store.directory / LOOKAHEAD, f"{name!r} is not of {len(order)} features")
        frame.insert(2 + place, name, arrays[name][order])
    return frame


def known_families(store: AuditStore, ranked: pd.DataFrame) -> np.ndarray:
    """The family of each feature of a ranked table, see `Audit.features`; read from the audit's file, or found and written there.

    Raises:
        AuditError: the file is damaged.
    """
    families, d_sae = np.zeros(len(ranked), np.int64), store.manifest["dictionary"]["d_sae"]
    if not store.manifest["settings"]["activations"]:
        return families
    path = store.directory / FAMILIES
    if not path.is_file():
        answers = (part.arrays for part in store.parts())
        signs = np.sign(leading_score(ranked).fillna(0).to_numpy())
        found = find_families(answers, ranked["feature"].to_numpy(), signs, d_sae)
        front = ranked["feature"].to_numpy()[: len(found)]
        write_frame(store, FAMILIES, pd.DataFrame({"feature": front, "family": found}))
    with reading(path):
        table = read_frame(path, columns=("feature", "family"))
        numbers, of_each = table["feature"].to_numpy(), table["family"].to_numpy()
        if numbers.dtype != np.int64 or of_each.dtype != np.int64 or len(set(numbers.tolist())) != len(table):
            raise ValueError("its features are not numbers, each once")
        if len(table) and not (numbers.min() >= 0 and numbers.max() < d_sae and of_each.min() >= 0):
            raise ValueError(f"its features are not those of a dictionary of {d_sae}")
    place = np.zeros(d_sae, np.int64)
    place[numbers] = of_each
    return place[ranked["feature"].to_numpy()]


def leading_score(frame: pd.DataFrame) -> pd.Series:
    """What the table is ranked by: effect size, selection in units of its standard error, or attribution."""
    return frame["effect_size"] if "effect_size" in frame else _selection_or_attribution(frame)


def _selection_or_attribution(frame: pd.DataFrame) -> pd.Series:
    return selection_in_standard_errors(frame) if "selection" in frame else frame["attribution"]


def rank(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest in size first, by `leading_score`."""
    return _largest_first(frame, leading_score(frame))


def rank_for_readers(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest in size first, by the score that leads, see `known_scores`."""
    effects = known_scores(frame)[:1] == ["effect_size"]
    return _largest_first(frame, frame["effect_size"] if effects else _selection_or_attribution(frame))


def _largest_first(frame: pd.DataFrame, score: pd.Series) -> pd.DataFrame:
    size = score.abs().fillna(-1).to_numpy()
    if (size <= 0).all():
        size = frame["attribution"].abs().to_numpy()
    return frame.iloc[np.argsort(-size, kind="stable")].reset_index(drop=True)
