"""What an audit says of its features in words: labels, contexts, vocabulary, and the topics of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from accelerate import PartialState

from ..errors import AuditError
from ..io.feature_labels import LabelSet, labels_of, with_labels
from ..io.manifest import reading
from .cell_table import CELLS, known_cells
from .contexts import ACTIVITY, activity_frame, read_contexts, read_words
from .example_table import active_rows
from .store import AuditStore
from .topic_contexts import TOPIC_CONTEXTS, gather_topic_contexts, read_topic_contexts
from .topics import NO_TOPICS, Topics, gather_topics, read_topics
from .vocabulary import read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.opener import DatasetLike
    from ..saes.dictionary import FeatureDictionary

SIGNIFICANT = 0.05
"""q-value below which a feature is beyond chance."""


class AuditText:
    """The part of an `Audit` that is read as text.

    Attributes: as of `Audit`.
    """

    _store: AuditStore
    directory: Path
    manifest: dict[str, Any]
    dictionary: FeatureDictionary
    sides: tuple[str, str]
    _lines: np.ndarray | None

    def labels(self) -> LabelSet:
        """The labels that `labels.json` has of its features, see `make_labels`.

        Raises:
            AuditError: the file is damaged.
        """
        return labels_of(self.directory, self.dictionary.name, self.dictionary.identity)

    def _words(self) -> np.ndarray:
        if self._lines is None:
            self._lines = read_words(self._store)
        return self._lines

    def contexts(self, features: Sequence[int] | None = None, topic: int | None = None) -> pd.DataFrame:
        """Where some features, or all, are most active in the answers, by feature, the strongest first.

        Columns: feature; kind, "strongest" or "drawn" (drawn evenly among the answers in which the feature is active, so as it
        usually is); source, the answer's side or "generation"; row, its number in the data, -1 of a generation; token, the place in
        the answer; activation there; prompt, the end of the prompt; before, at and after, the text around the place. One place an
        answer. Without an encoder the activation is the projection, and the largest in size count. Empty in an audit without activations.

        With `topic`, the number of one of `topics`, the strongest places inside it, as far as the feature is preferred otherwise there,
        beyond chance (`topic_features`).

        Raises:
            AuditError: for a feature that the dictionary does not have, or a topic that the audit does not have.
        """
        if features is not None:
            self._directions(features)
        if topic is None:
            frame = read_contexts(self._store)
        else:
            topics = self._topics()
            if not 1 <= topic <= len(topics):
                raise AuditError(
                    f"Topic {topic} is not one of this audit's {len(topics)} topics; look at audit.topics()."
                )
            frame = read_topic_contexts(self._store, topics)
            frame = frame[frame["topic"] == topic]
        return (
            frame if features is None else frame[frame["feature"].isin(list(features))].reset_index(drop=True)
        )

    def active_answers(self, features: Sequence[int]) -> pd.DataFrame:
        """The answers of the data in which some features are active: columns feature, row and source, as in `contexts`.

        Raises:
            AuditError: for an audit without activations.
        """
        self._check_activations(features)
        return pd.concat(
            [active_rows(part, features, self.sides) for part in self._store.parts()], ignore_index=True
        )

    def vocabulary(self, features: Sequence[int]) -> pd.DataFrame:
        """Which tokens some features' directions raise and lower most, through the final norm and the unembedding: columns feature, kind
        ("promoted" or "suppressed") and token, the strongest first. Known of the 150 features in front by effect size, selection and
        attribution each; empty in an audit of a reward model, which writes nothing.
        """
        self._directions(features)
        frame = read_vocabulary(self._store)
        return frame[frame["feature"].isin(list(features))].reset_index(drop=True)

    def activity(self, features: Sequence[int]) -> pd.DataFrame:
        """How often some features are active: feature; density, the share of the answers' tokens on which it is active; and for a
        histogram of its largest activation in each answer, over the answers that have it, low and high of each bin and the number of
        answers of each side: 16 rows a feature.

        Raises:
            AuditError: for an audit without activations.
        """
        self._check_activations(features)
        path = self.directory / ACTIVITY
        arrays, _ = self._store.read_arrays(ACTIVITY)
        with reading(path):
            return activity_frame(arrays, features, self.sides, self.dictionary.d_sae)

    def find_topics(
        self, dataset: DatasetLike, column: str | None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Sort the prompts of a finished audit into topics, see `topics`, unless that was done before.

        Args:
            dataset: the rows that were audited.
            column: whose values are the topics; None for clusters.
            tokenizer: of the model, to keep contexts inside the topics; see `contexts`.

        Raises:
            AuditError: a column of too many values.
        """
        if self.manifest["settings"]["activations"] and PartialState().is_main_process:
            gather_topics(
                self._store, dataset, column, self.manifest["settings"]["seed"], (CELLS, TOPIC_CONTEXTS)
            )
            cells, topics = self.topic_features(), read_topics(self._store)
            if tokenizer is not None and topics is not None and not self._store.has(TOPIC_CONTEXTS):
                beyond = cells[cells["q_value"] < SIGNIFICANT]
                gather_topic_contexts(self._store, tokenizer, topics, beyond)
        PartialState().wait_for_everyone()

    def topics(self) -> pd.DataFrame:
        """What the prompts are about, one row a topic, the largest first.

        Columns: topic, its number from 1; name, the value of the column that `topic_column` named, or the words; words, which its
        prompts have and the others have not (Monroe et al. 2008); examples, how many. Without a column topics are clusters of the
        prompts' mean hidden states (`topic_clusters`). Empty in an audit without activations, or with too few prompts for clusters.
        """
        return self._topics().frame()

    def _topics(self) -> Topics:
        found = read_topics(self._store)
        return NO_TOPICS if found is None else found

    def topic_numbers(self) -> np.ndarray:
        """Number of each row's topic [rows of the data], see `topics`; 0 of a row that is no example, or where there are no topics."""
        found = read_topics(self._store)
        return (
            np.zeros(self.manifest["rows"], np.int64) if found is None else found.of_rows.astype(np.int64) + 1
        )

    def topic_features(self) -> pd.DataFrame:
        """In which topics a feature is preferred otherwise than elsewhere: one row a topic and feature, the clearest first.

        An example prefers a feature whose mean activation is larger in its preferred answers than in the others. Columns: topic, name,
        feature, label, label_accuracy, label_accuracy_low and words, as in `features`; preference, the share of examples that prefer the
        feature, of the topic's examples that differ in it; preference_elsewhere, the same of all other examples; interaction, the difference; examples and examples_elsewhere, how
        many differ; selection of the topic's examples alone, as in `features`, and selection_elsewhere, both with _standard_error;
        p_value of the same preference here as elsewhere (Fisher's exact test), and q_value (Benjamini–Hochberg over all cells).
        Cells in which fewer than ten examples differ, here or elsewhere, are left out.
        """
        topics = self._topics()
        frame = known_cells(self._store, topics)
        frame.insert(1, "name", np.array([*topics.names, ""], object)[frame["topic"].to_numpy() - 1])
        frame.insert(3, "words", self._words()[frame["feature"].to_numpy()])
        with_labels(frame, self.labels())
        return frame

    def _check_activations(self, features: Sequence[int]) -> None:
        self._directions(features)
        if not self.manifest["settings"]["activations"]:
            raise AuditError(
                "This audit has no activations; make it again with activations=True, and where the dictionary has thousands of "
                "directions with an encoder."
            )

    def _directions(self, features: Sequence[int]) -> np.ndarray:
        for feature in features:
            if not 0 <= feature < self.dictionary.d_sae:
                raise AuditError(
                    f"Feature {feature} is not in dictionary {self.dictionary.name!r}, which has features 0 to "
                    f"{self.dictionary.d_sae - 1}."
                )
        return self.dictionary.rows(features).numpy()
