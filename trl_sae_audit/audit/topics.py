"""Topics of an audit's prompts: clusters of what the model makes of them, or the values of a column; kept beside the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.opener import DatasetLike, iterate_rows
from ..errors import AuditError
from ..io.manifest import reading
from ..io.tables import read_frame
from .contexts import write_frame
from .store import AuditStore
from .topic_clusters import Clusters, draw_sample, enough_for_clusters
from .topic_words import TopicWords, prompt_text

TOPICS, TOPIC_OF_ROWS = "topics.parquet", "topics.safetensors"
MOST_TOPICS = 64
"""Values of a column that are told apart."""
COLUMNS = ("topic", "name", "words", "examples")
_NONE = "(none)"


@dataclass(frozen=True)
class Topics:
    """Topics of the rows of an audited dataset.

    Attributes:
        of_rows: number of each row's topic, from 0; -1 of a row that is no example [rows].
        names: of the topics: values of the column, or words.
        words: that their prompts have and the others have not.
        counts: examples of each.
    """

    of_rows: np.ndarray
    names: list[str]
    words: list[str]
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def frame(self) -> pd.DataFrame:
        """One row a topic, see `Audit.topics`."""
        columns = (np.arange(1, len(self) + 1), self.names, self.words, self.counts)
        return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


NO_TOPICS = Topics(np.zeros(0, np.int16), [], [], np.zeros(0, np.int64))


def gather_topics(
    store: AuditStore, dataset: DatasetLike, column: str | None, seed: int, dependent: Sequence[str] = ()
) -> None:
    """Find the topics of a finished audit's rows and keep them with it, unless these very topics are kept already.

    Args:
        store: of the audit.
        dataset: the rows that were audited.
        column: whose values are the topics; None for clusters of the prompts' states, where there are enough prompts for any.
        seed: of the clusters.
        dependent: files made with other topics, which go first.

    Raises:
        AuditError: too many values in the column.
    """
    described = {"column": column, "seed": seed}
    if store.has(TOPIC_OF_ROWS) and store.read_arrays(TOPIC_OF_ROWS)[1] == described:
        return
    for name in (*dependent, TOPICS, TOPIC_OF_ROWS):
        store.remove(name)
    names: list[str] = []
    if column is None:
        of_rows = _clusters(store, seed)
    else:
        of_rows, names = _values(store, dataset, column)
    counts = np.bincount(of_rows[of_rows >= 0])
    order = np.argsort(-counts, kind="stable")  # the largest is the first
    place = np.append(np.argsort(order), -1)  # -1 stays
    of_rows = place[of_rows].astype(np.int16)
    words = TopicWords(len(order))
    if len(order):
        for row in iterate_rows(dataset):
            if row.columns is not None and of_rows[row.index] >= 0:
                words.add(of_rows[row.index], prompt_text(row.columns))
    lines = words.lines()
    found = Topics(of_rows, [names[number] for number in order] if names else lines, lines, counts[order])
    write_frame(store, TOPICS, found.frame())
    store.write_arrays(TOPIC_OF_ROWS, {"topic": of_rows}, described)


def read_topics(store: AuditStore) -> Topics | None:
    """The topics that are kept with an audit, None where none are.

    Raises:
        AuditError: they are damaged.
    """
    if not (store.has(TOPICS) and store.has(TOPIC_OF_ROWS)):
        return None
    of_rows = store.read_arrays(TOPIC_OF_ROWS)[0].get("topic", np.zeros(0))
    path = store.directory / TOPICS
    with reading(path):
        frame = read_frame(path, columns=COLUMNS)
        check_topic_frame(frame, path)
        if of_rows.dtype != np.int16 or of_rows.shape != (store.manifest["rows"],):
            raise ValueError(f"it is not of {store.manifest['rows']} rows")
        counts = np.bincount(of_rows[of_rows >= 0], minlength=len(frame))
        if (counts != frame["examples"].to_numpy()).any() or (of_rows < -1).any():
            raise ValueError("its topics are not those of the rows")
    return Topics(of_rows, frame["name"].tolist(), frame["words"].tolist(), counts)


def check_topic_frame(frame: pd.DataFrame, path: Path) -> None:
    """Refuse, with a ValueError, what is no table of topics."""
    if frame["topic"].tolist() != list(range(1, len(frame) + 1)) or len(frame) > MOST_TOPICS:
        raise ValueError(f"{path.name} does not number its topics")
    for name in ("name", "words"):
        if not frame[name].map(lambda value: isinstance(value, str)).all():
            raise ValueError(f"its column {name!r} is not of texts")
    if frame["examples"].dtype.kind != "i":
        raise ValueError("its column 'examples' is not of counts")


def _clusters(store: AuditStore, seed: int) -> np.ndarray:
    """Topic of each row, by clusters; -1 of every row where there are too few prompts."""
    found = np.full(store.manifest["rows"], -1, np.int64)
    if enough_for_clusters(store.manifest["examples"]):
        sample = draw_sample((states for _, states in store.prompt_states()), store.manifest["examples"])
        clusters = Clusters(sample, seed)
        for rows, states in store.prompt_states():
            found[rows] = clusters.assign(states)
        used = found >= 0
        found[used] = np.unique(found[used], return_inverse=True)[1]
    return found


def _values(store: AuditStore, dataset: DatasetLike, column: str) -> tuple[np.ndarray, list[str]]:
    """Topic of each row by its value in a column, and the values."""
    found, numbers = np.full(store.manifest["rows"], -1, np.int64), dict[str, int]()
    examples = np.zeros(store.manifest["rows"], bool)
    for rows, _ in store.prompt_states():
        examples[rows] = True
    for row in iterate_rows(dataset):
        if examples[row.index]:
            assert row.columns is not None
            value = row.columns.get(column)
            found[row.index] = numbers.setdefault(_NONE if value is None else str(value), len(numbers))
            if len(numbers) > MOST_TOPICS:
                raise AuditError(
                    f"Column {column!r} of the dataset has more than {MOST_TOPICS} values; topics need a column of a few, "
                    "or none, and prompts are sorted by what the model makes of them."
                )
    return found, list(numbers)


def check_topic_column(dataset: DatasetLike, column: str | None) -> None:
    """Refuse, with an AuditError, a column of topics that the first row of the dataset does not have."""
    if column is None:
        return
    first = next((row.columns for row in iterate_rows(dataset) if row.columns is not None), None)
    if first is not None and column not in first:
        raise AuditError(
            f"The dataset has no column {column!r} for topics, but {', '.join(sorted(first))}; name one of these."
        )
