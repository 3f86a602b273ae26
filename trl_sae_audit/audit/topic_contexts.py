"""Contexts inside a topic: where a feature that is preferred otherwise there is most active among the topic's own answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ..io.manifest import reading
from ..saes.contexts import PlaceKeeper, Places, Window
from .contexts import COLUMNS, Text, check_contexts, context_frame, find_windows, places_of, write_frame
from .store import AuditStore, Part
from .topics import Topics

TOPIC_CONTEXTS = "topic_contexts.parquet"
MOST_CELLS = 200
"""Topics and features, the clearest, whose contexts are kept."""
_KEPT = 4


def gather_topic_contexts(
    store: AuditStore, tokenizer: PreTrainedTokenizerBase, topics: Topics, cells: pd.DataFrame
) -> None:
    """Find, decode and keep the strongest places inside their topics of the first `MOST_CELLS` of some cells.

    Args:
        store: of a finished audit.
        tokenizer: of the model.
        topics: of its rows.
        cells: columns topic and feature.
    """
    cells = cells[["topic", "feature"]].head(MOST_CELLS)
    number = np.full((len(topics) + 1, store.manifest["dictionary"]["d_sae"]), -1)
    number[cells["topic"], cells["feature"]] = np.arange(len(cells))
    keeper = PlaceKeeper(max(len(cells), 1), _KEPT, drawn=0)
    first = 0
    for part in store.parts():
        keeper.add(_places_in_cells(part, first, topics, number))
        first += part.arrays.side.size
    windows: dict[tuple[int, int], tuple[Text, Window]] = {}
    first = 0
    for part in store.parts():
        windows |= find_windows(part, keeper.strongest, first, store.manifest["loss"]["sides"])
        first += part.arrays.side.size
    kinds = np.repeat(["strongest"], len(keeper.strongest))
    frame = context_frame(tokenizer, keeper.strongest, kinds, windows.__getitem__)
    cell = frame["feature"].to_numpy()
    frame["feature"] = cells["feature"].to_numpy(np.int64)[cell]
    frame.insert(0, "topic", cells["topic"].to_numpy(np.int64)[cell])
    write_frame(store, TOPIC_CONTEXTS, frame)


def _places_in_cells(part: Part, first: int, topics: Topics, number: np.ndarray) -> Places:
    """The strongest places of a part's answers that belong to a cell, with the number of the cell for a feature."""
    places = places_of(part, first)
    row = part.row[(places.text - first) // part.arrays.side.shape[1]]
    cell = number[topics.of_rows[row].astype(np.int64) + 1, places.feature]
    return replace(places, feature=cell.astype(np.int32)).take(cell >= 0)


def read_topic_contexts(store: AuditStore, topics: Topics) -> pd.DataFrame:
    """The contexts inside topics, by cell, the strongest first; empty where none are kept.

    Raises:
        AuditError: the file is damaged.
    """
    if not store.has(TOPIC_CONTEXTS):
        return pd.DataFrame({name: [] for name in ("topic", *COLUMNS)}).astype(
            {"topic": np.int64, "feature": np.int64}
        )
    path = store.directory / TOPIC_CONTEXTS
    frame = check_contexts(path, store.manifest["dictionary"]["d_sae"], ("topic",))
    with reading(path):
        numbers = frame["topic"]
        if numbers.dtype != np.int64 or (
            len(numbers) and not (numbers.min() >= 1 and numbers.max() <= len(topics))
        ):
            raise ValueError(f"its topics are not 1 to {len(topics)}")
    return frame
