"""An audit's table of topics and features: computed once and kept."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..io.manifest import reading
from ..io.tables import read_frame
from .answers_file import read_groups
from .contexts import write_frame
from .prompt_groups import by_prompt
from .store import AuditStore
from .topic_features import CELL_COLUMNS, topic_features
from .topics import Topics

CELLS = "topic_features.parquet"


def known_cells(store: AuditStore, topics: Topics) -> pd.DataFrame:
    """The cells, read from the audit's file, or computed and written there; none without topics.

    Raises:
        AuditError: the file is damaged.
    """
    d_sae = store.manifest["dictionary"]["d_sae"]
    if not len(topics):
        return topic_features([], topics.of_rows, 0, d_sae)
    path = store.directory / CELLS
    if not path.is_file():
        groups = read_groups(store)
        parts = store.parts() if groups is None else [by_prompt(store.parts(), groups)]
        by_weight = store.manifest["loss"]["objective"] == "reward"
        frame = topic_features(parts, topics.of_rows, len(topics), d_sae, by_weight)
        write_frame(store, CELLS, frame)
        return frame
    with reading(path):
        frame = read_frame(path, columns=CELL_COLUMNS)[list(CELL_COLUMNS)]
        for name, first, last in (("topic", 1, len(topics)), ("feature", 0, d_sae - 1)):
            numbers = frame[name].to_numpy()
            if numbers.dtype.kind != "i" or (
                len(numbers) and not (numbers.min() >= first and numbers.max() <= last)
            ):
                raise ValueError(f"its column {name!r} is not of numbers from {first} to {last}")
        if frame.duplicated(["topic", "feature"]).any():
            raise ValueError("it has a cell twice")
        for name in CELL_COLUMNS:
            if not np.issubdtype(frame[name].dtype, np.number):
                raise ValueError(f"its column {name!r} is not of numbers")
    return frame
