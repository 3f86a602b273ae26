"""Labels: what features are called, by whom, and how well that tells where they are active; `labels.json` beside an artefact.

Everything that shows a feature takes its label from here: `columns` for tables of features, `caption` for a line of text.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from ..errors import AuditError
from .atomic import write_durably
from .manifest import document, fit, read_document, reading

FILE = "labels.json"
CHANCE = 0.5
"""Balanced accuracy of a guess."""
_LONGEST = 60
"""Characters of a label in a caption."""

Source = Literal["neuronpedia", "endpoint", "model", "file"]


@dataclass(frozen=True)
class LabelScore:
    """How well something tells contexts of a feature from others.

    Attributes:
        accuracy: balanced: the mean of the shares that are right among the contexts of the feature and among the others.
        low, high: its 95 % interval.
        active, silent: contexts of either kind that were judged.
    """

    accuracy: Annotated[float, Field(ge=0, le=1)]
    low: float
    high: float
    active: NonNegativeInt
    silent: NonNegativeInt

    @property
    def is_chance(self) -> bool:
        """Whether it does no better than a guess, as far as these contexts tell."""
        return self.low <= CHANCE

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} [{self.low:.2f}, {self.high:.2f}]" + " chance" * self.is_chance


@dataclass(frozen=True)
class Label:
    """A feature's label and its scores, see `labels.score`; a score is None where it is not known.

    Attributes:
        feature: index.
        text: the label; empty where only the line of words was scored.
        source, explainer: where it is from, and which model wrote it.
        judge: the model that scored it.
        detection, fuzzing: of the label. words_detection, words_fuzzing: of the line of words.
    """

    feature: NonNegativeInt
    text: str = ""
    source: Source = "file"
    explainer: str = ""
    judge: str = ""
    detection: LabelScore | None = None
    fuzzing: LabelScore | None = None
    words_detection: LabelScore | None = None
    words_fuzzing: LabelScore | None = None

    @property
    def is_chance(self) -> bool:
        """Whether its detection was scored and is no better than chance."""
        return self.detection is not None and self.detection.is_chance


@dataclass(frozen=True)
class LabelSet:
    """Labels of some features of one dictionary.

    Attributes:
        dictionary, identity: its name and its content hash.
        labels: feature → its label.
    """

    dictionary: str
    identity: str
    labels: Mapping[int, Label] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Label]:
        return iter(self.labels.values())

    def text(self, feature: int) -> str:
        """The label of a feature; empty where there is none."""
        return self.labels[feature].text if feature in self.labels else ""

    def updated(self, labels: Iterable[Label]) -> LabelSet:
        """The same with some labels in the place of those of the same features."""
        return replace(self, labels={**self.labels, **{label.feature: label for label in labels}})

    def columns(self, features: Iterable[int]) -> dict[str, list[Any]]:
        """Of some features: label, label_accuracy and label_accuracy_low (of its detection, NaN where it was not scored)."""
        found = [self.labels.get(int(feature)) for feature in features]
        scores = [None if label is None else label.detection for label in found]
        return {
            "label": ["" if label is None else label.text for label in found],
            "label_accuracy": [math.nan if score is None else score.accuracy for score in scores],
            "label_accuracy_low": [math.nan if score is None else score.low for score in scores],
        }

    def save(self, directory: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> Path:
        """Put these labels into `labels.json` of a directory, beside what it has of other features and dictionaries.

        Raises:
            AuditError: the file cannot be written, or what is there is damaged.
        """
        path = Path(directory) / FILE
        known = read_label_sets(directory)
        own = known.get(self.identity, replace(self, labels={}))
        known[self.identity] = replace(self, labels=own.updated(self).labels)
        body = {"config": dict(config or {}), "dictionaries": [_plain(each) for each in known.values()]}
        try:
            write_durably(path, document("labels", body))
        except OSError as error:
            raise AuditError(
                f"{path} could not be written ({error.strerror}); check the directory."
            ) from error
        return path


def read_label_sets(directory: str | os.PathLike[str]) -> dict[str, LabelSet]:
    """Identity of a dictionary → the labels of its features in a directory; empty where there are none.

    Raises:
        AuditError: the file is damaged, or of an unknown format.
    """
    path = Path(directory) / FILE
    return read_label_document(path) if path.exists() else {}


def read_label_document(path: Path) -> dict[str, LabelSet]:
    """The same of a file of that form."""
    content = read_document(path, "labels")
    with reading(path):
        stored = fit(list[_StoredSet], content.get("dictionaries"))
    return {
        each.identity: LabelSet(
            each.dictionary, each.identity, {label.feature: label for label in each.labels}
        )
        for each in stored
    }


def labels_of(directory: str | os.PathLike[str], name: str, identity: str) -> LabelSet:
    """The labels in a directory of one dictionary's features."""
    return read_label_sets(directory).get(identity, LabelSet(name, identity))


@dataclass(frozen=True)
class _StoredSet:
    dictionary: str
    identity: str
    labels: list[Label]


def _plain(labels: LabelSet) -> dict[str, Any]:
    """Without what is not known."""
    entries = [
        {name: value for name, value in asdict(label).items() if value not in (None, "")}
        for _, label in sorted(labels.labels.items())
    ]
    return {"dictionary": labels.dictionary, "identity": labels.identity, "labels": entries}


def caption(row: Mapping[Any, Any]) -> str:
    """What to say of a feature in a line, from its row in a table of features: its label with the accuracy, then its words.

    `agrees with the user (0.84): you're right · Great question!`; `(chance)` where the label does no better than chance.
    """
    label, words = str(row["label"] or ""), str(row["words"])
    if not label:
        return words
    label = " ".join(label.split())
    label = label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
    accuracy = row["label_accuracy"]
    if not math.isnan(accuracy):
        label += " (chance)" if row["label_accuracy_low"] <= CHANCE else f" ({accuracy:.2f})"
    return f"{label}: {words}" if words else label


def captions(frame: Any) -> list[str]:
    """`caption` of every row of a table of features."""
    names = ("label", "label_accuracy", "label_accuracy_low", "words")
    return [
        caption(dict(zip(names, row, strict=True)))
        for row in zip(*(frame[name] for name in names), strict=True)
    ]


def with_labels(frame: Any, labels: LabelSet, watched: Sequence[str] | None = None) -> None:
    """Add the columns of `LabelSet.columns` to a table of features with words, before the words.

    Args:
        frame: a DataFrame, changed in place.
        labels: of its dictionary.
        watched: what the user calls each feature, empty where not watched; comes before the label.
    """
    columns = labels.columns(frame["feature"])
    for place, name in enumerate(watched or ()):
        if name:
            columns["label"][place] = name
            columns["label_accuracy"][place] = columns["label_accuracy_low"][place] = math.nan
    place = list(frame.columns).index("words")
    for name in reversed(columns):
        frame.insert(place, name, columns[name])
