"""Topics and families of an audit, as rows of text for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..audit.evidence_files import Context, contexts_in
from ..io.feature_labels import caption
from ..io.manifest import kind_of
from ..statistics import NORMAL_QUANTILE
from ..text import sanitize_excerpt
from .lead import SIGNIFICANT, known_leads, read_lead
from .sources import ReportSource
from .text import format_count, format_number, format_percent, format_probability, format_signed

if TYPE_CHECKING:
    from ..audit.result import Audit

_CELLS = 20
_FAMILIES = 20
_NAME = 80


@dataclass(frozen=True)
class Cell:
    """A feature that a topic prefers otherwise than elsewhere: texts, and the numbers that a table is sorted by."""

    feature: int
    words: str
    here: str
    elsewhere: str
    selection: str
    q: str
    values: tuple[float, float, float, float]
    contexts: list[Context]


@dataclass(frozen=True)
class Topic:
    """A topic; `total` is how many cells are beyond chance, of which `cells` are the clearest."""

    number: int
    name: str
    words: str
    examples: int
    total: int
    cells: list[Cell]

    @property
    def is_named_by_words(self) -> bool:
        """Whether the words say nothing that the name does not, as of clusters."""
        return self.words in ("", self.name)


@dataclass(frozen=True)
class TopicSection:
    """The section about topics."""

    sentence: str
    topics: list[Topic]


@dataclass(frozen=True)
class Family:
    """Features that go together, the leader first: number, words, leading score."""

    number: int
    members: list[tuple[int, str, str]]


def read_topic_section(source: ReportSource) -> TopicSection | None:
    """What an audit says of topics; None of a run, or where the audit has none.

    Raises:
        AuditError: the audit's files are damaged.
    """
    if source.kind != "audit" or kind_of(source.directory, "audit") != "audit":
        return None
    from ..audit.result import Audit  # imports torch

    audit = Audit.load(source.directory)
    topics, cells = audit.topics(), audit.topic_features()
    if topics.empty:
        return None
    beyond = cells[cells["q_value"] < SIGNIFICANT]
    found = [
        _read_topic(audit, row, beyond[beyond["topic"] == row["topic"]]) for row in topics.to_dict("records")
    ]
    features = beyond["feature"].nunique()
    sentence = (
        f"{format_count(features, 'feature')} {'is' if features == 1 else 'are'} preferred differently in one topic than in the others, "
        f"beyond chance (q < {SIGNIFICANT:g} over {len(cells):,} topics and features)."
        if features
        else f"No feature is preferred differently in one of {len(topics)} topics than in the others, beyond chance."
    )
    return TopicSection(sentence, found)


def _read_topic(audit: Audit, topic: dict[Any, Any], cells: pd.DataFrame) -> Topic:
    front = cells.head(_CELLS)
    contexts = audit.contexts(front["feature"].tolist(), topic=int(topic["topic"]))
    return Topic(
        int(topic["topic"]),
        sanitize_excerpt(topic["name"] or f"topic {topic['topic']}", _NAME),
        sanitize_excerpt(topic["words"], _NAME),
        int(topic["examples"]),
        len(cells),
        [_read_cell(row, contexts) for row in front.to_dict("records")],
    )


def _read_cell(row: dict[Any, Any], contexts: pd.DataFrame) -> Cell:
    margin = NORMAL_QUANTILE * row["selection_standard_error"]
    return Cell(
        int(row["feature"]),
        sanitize_excerpt(caption(row), 120),
        f"{format_percent(row['preference'])} of {row['examples']:,}",
        f"{format_percent(row['preference_elsewhere'])} of {row['examples_elsewhere']:,}",
        f"{format_signed(row['selection'], 2)} ± {format_number(margin, 2)}",
        format_probability(row["q_value"]),
        (row["preference"], row["preference_elsewhere"], row["selection"], row["q_value"]),
        contexts_in(contexts[contexts["feature"] == row["feature"]]),
    )


def read_families(source: ReportSource) -> list[Family]:
    """The first families of an audit's first dictionary; none of a run."""
    frame = source.views[0].features
    if "family" not in frame:
        return []
    lead = known_leads(frame)[0]
    frame = frame.join(read_lead(frame, lead).add_prefix("lead_"))
    frame = frame[frame["family"] > 0].sort_values(
        "lead_value", key=lambda values: -values.abs(), kind="stable"
    )
    return [
        Family(
            number,
            [
                (
                    int(row["feature"]),
                    sanitize_excerpt(row["words"], 120),
                    format_signed(row["lead_value"], 2),
                )
                for row in members.to_dict("records")
            ],
        )
        for number, members in _first(frame, range(1, _FAMILIES + 1))
        if len(members)
    ]


def _first(frame: pd.DataFrame, numbers: Sequence[int]) -> list[tuple[int, pd.DataFrame]]:
    return [(number, frame[frame["family"] == number]) for number in numbers]
