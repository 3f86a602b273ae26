"""An audit read back: features, examples, and every example's part in any feature."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from accelerate import PartialState

from ..errors import AuditError
from ..flags import Flag
from ..io.atomic import whole_directory
from ..io.feature_labels import with_labels
from ..io.manifest import damaged
from .answers_file import ANSWERS, keep_answers, read_answers
from .content import FAMILIES, LOOKAHEAD, check_finished
from .contexts import keep_generations
from .example_table import dense_values, example_rows, pool_activations, signed_sum
from .feature_table import (
    add_predictions,
    known_families,
    known_statistics,
    rank,
    rank_for_readers,
)
from .leading import Score, known_scores
from .store import AuditStore
from .text_tables import SIGNIFICANT, AuditText
from .vocabulary import keep_vocabulary

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..data.opener import Row
    from ..saes.dictionary import FeatureDictionary
    from .lookahead.run import AuditLookahead

_INFLUENCE = "influence.safetensors"


class Audit(AuditText):
    """What an audit found: every feature's statistics, and every example's own gradient to ask more of.

    Attributes:
        directory: where it lies.
        manifest: what was audited, with what, and how much of it.
        dictionary: the directions; without encoder.
        sides: names of the two sides, ("chosen", "rejected") for pairs.
    """

    def __init__(self, store: AuditStore) -> None:
        check_finished(store.manifest, store.directory)
        store.check()
        self._store = store
        self.directory = store.directory
        self.manifest = store.manifest
        self.dictionary = store.dictionary()
        self.sides: tuple[str, str] = tuple(self.manifest["loss"]["sides"])
        self._ranked: pd.DataFrame | None = None
        self._lines: np.ndarray | None = None
        self._lookahead: AuditLookahead | None = None

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read an audit that was saved, or made with `output_dir`.

        Raises:
            AuditError: no audit, an unfinished or damaged one, or one of an unknown format.
        """
        return cls(AuditStore.open(Path(path)))

    def save(self, path: str | Path) -> Path:
        """Copy the audit to the directory `path`, all of it or nothing.

        Raises:
            AuditError: `path` exists, or cannot be written.
        """
        target = Path(path)
        if target.exists():
            if target.resolve() == self.directory.resolve():
                return target
            raise AuditError(f"{target} exists already; choose another directory or delete it.")
        self.features()
        try:
            with whole_directory(target) as scratch:
                unfinished = shutil.ignore_patterns("*.tmp", ".lock")
                shutil.copytree(self.directory, scratch, ignore=unfinished, dirs_exist_ok=True)
        except OSError as error:
            raise AuditError(
                f"{target} could not be written ({error.strerror}); make room and save again."
            ) from error
        return target

    def __len__(self) -> int:
        return self.manifest["examples"]

    @property
    def set_aside(self) -> list[tuple[int, str]]:
        """(row number, reason) of the rows that were not audited."""
        return [(row, reason) for row, reason in self.manifest["set_aside"]]

    def features(self) -> pd.DataFrame:
        """One row a feature, the largest |effect_size| first. Positive = training on the data up-weights the feature.

        *In words*: label, where there is one (see `make_labels` and `fetch_labels`), and label_accuracy with label_accuracy_low, the
        balanced accuracy of its detection and the lower end of its 95 % interval: at 0.5 or below it is no better than chance. words,
        the phrases around the places where the feature is most active in the answers (see `contexts`); empty where
        it is active nowhere, or in an audit without activations. family: features that are active together in the answers (a mean
        correlation of 0.3 over answers) and that the data push the same way, numbered from 1 by their first member; 0 of a feature
        alone, and of those after the first 1,024.

        *In generations*, after a lookahead that sampled answers: effect_size, what one optimizer step on this data does to the
        feature in the model's own answers, in units of its spread over these answers (of the mean root of the activation, see
        `lookahead.generations`), with its 95 % interval effect_size_low and _high (other prompts and other pairs of the kind);
        NaN for a feature in which the sampled answers do not differ. predicted_change_in_generations, the same in units of
        activation; predicted_frequency_change, of the share of answers in which the feature is active; generation_activation
        and generation_frequency, both before the step.

        *Selected*, with activations: selection, `Σ_{i,t} c_{i,t}·(a_f[i,t] − ā_f) / n` over the answers' tokens, what the loss asks
        of them by `c = −∂L_i/∂log π(y_t)`, against the mean ā_f over all of them (the same score as in a run's record), with its
        standard error, p-value (sign flips over examples) and q-value (Benjamini–Hochberg over features). Without a lookahead
        the table is ordered by selection in units of that standard error.

        *In the data*: share of answers of each side in which the feature is active, their difference (disparity) with its
        p_value; mean_activation_difference, max_activation_difference, projection_difference (mean residual of one side less
        that of the other, along the direction), active_examples.

        *What the loss asks of the layer*: attribution and its two sides, of the mean loss over the examples;
        standard_error of it; p_value (sign-flip test over examples) and q_value; cosine with the descent direction, share
        (its square; directions overlap, so shares do not add up) and lift (share · d_model; 1 is what a random
        direction gets); effective_examples, `(Σ|c|)²/Σc²`, the number of examples the feature rests on;
        split_half_agreement, how often two random halves of the examples agree on the sign; length_correlation of
        the examples' contributions with the difference of answer lengths, and the attribution, p and q that remain
        at equal length (least squares); activation_attribution, `-Σ a_f⟨g, ∂h/∂a_f⟩`.

        *On given text*, where a lookahead had a probe of pairs: predicted_change, of the mean activation on its answers by the
        step, and probe_activation, that mean before. After an unrolled run the same two by a whole run, unrolled_change and
        unrolled_change_in_generations.
        """
        if self._ranked is None:
            ranked = rank(add_predictions(self._store, known_statistics(self._store, self.dictionary)))
            ranked.insert(2, "words", self._words()[ranked["feature"].to_numpy()])
            ranked.insert(3, "family", known_families(self._store, ranked))
            self._ranked = ranked
        frame = self._ranked.copy()  # the caller's to change
        with_labels(frame, self.labels())  # which may have come since
        return frame

    def keep_vocabulary(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, dictionary: FeatureDictionary
    ) -> None:
        """Keep the vocabulary of the features in front with a finished audit, see `vocabulary`."""
        if PartialState().is_main_process:
            keep_vocabulary(self._store, self.features(), model, tokenizer, dictionary)
        PartialState().wait_for_everyone()

    def leads_with(self) -> Score:
        """The score that a reader should look at first, by which `ranking` is ordered.

        The effect size, unless its intervals say nothing (fewer than half of those that exclude 0 by chance do): then selection, in
        units of its standard error. Without activations attribution.
        """
        return next(iter(known_scores(self.features())), "attribution")

    def ranking(self) -> pd.DataFrame:
        """`features` in the order in which tables and reports show them: by the score of `leads_with`, the largest in size first."""
        return rank_for_readers(self.features())

    def beyond_chance(self) -> pd.DataFrame:
        """The rows of `features` that the examples tell from chance, at a false discovery rate of 5 %.

        By selection, where there are activations: labels exchanged at random would not select for the feature as these do.
        Where generations were looked ahead to, the effect's interval must not lie wholly on the other side of 0; it may contain 0,
        since sampled answers say nothing of what the model never says. Without activations by attribution.
        """
        frame = self.features()
        if "selection_q_value" not in frame:
            return frame[frame["q_value"] < SIGNIFICANT]
        kept = frame["selection_q_value"] < SIGNIFICANT
        if "effect_size" in frame:
            sign = np.sign(frame["selection"])
            kept &= ~((sign * frame["effect_size_low"] < 0) & (sign * frame["effect_size_high"] < 0))
        return frame[kept]

    @property
    def lookahead(self) -> dict[str, Any] | None:
        """What the lookahead was: pairs in the step, prompts and answers, the optimizer's rule; None without one."""
        return self._store.read_arrays(LOOKAHEAD)[1] if self._store.has(LOOKAHEAD) else None

    def contributions(self, features: Sequence[int]) -> np.ndarray:
        """Each example's part of the attribution of some features: [n, len(features)], adding up to it over rows.

        Raises:
            AuditError: for a feature that the dictionary does not have.
        """
        directions = self._directions(features)
        parts = [-(part.arrays.gradient.sum(1) @ directions.T) for part in self._store.parts()]
        return np.concatenate(parts) / len(self)

    def activation_gaps(self, features: Sequence[int], pooling: str = "mean") -> np.ndarray:
        """Activation in the first answer less that in the second (or that of the only one): [n, len(features)].

        Args:
            features: to look at.
            pooling: "mean" over the answer's tokens; "max", the activation largest in size: whether a feature occurs
                in an answer at all, however long it is; "active", 1 where it is active in the answer.

        Raises:
            AuditError: for an audit without activations.
        """
        self._check_activations(features)
        parts = [
            signed_sum(part.arrays, pool_activations(part.arrays, pooling), features)
            for part in self._store.parts()
        ]
        return np.concatenate(parts)

    def activation_contributions(self, features: Sequence[int]) -> np.ndarray:
        """Each example's part of the activation attribution of some features: [n, len(features)], adding up to it.

        Raises:
            AuditError: for an audit without activations.
        """
        self._check_activations(features)
        parts = [
            dense_values(part.arrays, part.arrays.activation_attribution, features)
            .reshape(*part.arrays.side.shape, -1)
            .sum(1)
            for part in self._store.parts()
        ]
        return np.concatenate(parts) / len(self)

    def influence(self, flags: Iterable[Flag]) -> pd.DataFrame:
        """What each example adds to the predicted change of flagged features, one row an example and flag.

        Columns row, feature, label, influence; over the rows of the step, and with what momentum and weight decay do besides,
        it adds up to the feature's predicted_change, or without a probe of pairs to its predicted_change_in_generations. Of a
        row that the step was not taken on it is what it would add. Kept with the audit once computed.

        Raises:
            AuditError: no lookahead was asked for, or, in an audit read from disk, this feature was not asked for then.
        """
        flags = list(flags)
        for flag in flags:
            flag.check(self.dictionary)
        values, rows = self.influence_of([flag.feature for flag in flags]), self.rows()
        tables = [
            pd.DataFrame(
                {"row": rows, "feature": flag.feature, "label": flag.label, "influence": values[:, column]}
            )
            for column, flag in enumerate(flags)
        ]
        return pd.concat(tables, ignore_index=True)

    def influence_of(self, features: Sequence[int]) -> np.ndarray:
        """The same as an array [n, len(features)].

        Raises:
            AuditError: as `influence`.
        """
        self._directions(features)
        if not self._store.has(LOOKAHEAD):
            raise AuditError("This audit has no influence; pass lookahead= to audit_preferences.")
        known = self._store.read_arrays(_INFLUENCE)[0] if self._store.has(_INFLUENCE) else {}
        if any(values.shape != (len(self),) for values in known.values()):
            raise damaged(self.directory / _INFLUENCE, f"it is not of {len(self)} examples")
        missing = [feature for feature in features if str(feature) not in known]
        if missing:
            known = {**known, **self._new_influences(missing)}
            if PartialState().is_main_process:
                self._store.write_arrays(_INFLUENCE, known, {})
        return np.stack([known[str(feature)] for feature in features], axis=1)

    def _new_influences(self, features: Sequence[int]) -> dict[str, np.ndarray]:
        if self._lookahead is None:
            raise AuditError(
                f"The influence on feature {features[0]} was not computed when the audit was made, and needs the model: call "
                "audit_preferences with the same arguments and output_dir, then ask again."
            )
        return {str(feature): self._lookahead.influence(feature) for feature in features}

    @property
    def can_predict(self) -> bool:
        """Whether `predict_on` can: the audit was made in this process, with a lookahead that sampled answers."""
        return self._lookahead is not None and self._lookahead.config.sampling is not None

    def predict_on(self, rows: Iterable[Row]) -> tuple[dict[str, np.ndarray], int]:
        """What an optimizer step on other rows of the data would do, at the same prompts and in the same answers.

        Args:
            rows: with the numbers that they have in the audited data.

        Returns:
            The lookahead's columns of `features`, by name, in the dictionary's order, and the number of rows in the step; nothing and 0
            where none of the rows is one that the lookahead takes its step on.

        Raises:
            AuditError: the audit cannot predict.
        """
        if self._lookahead is None:
            raise AuditError(
                "This audit was read from disk and has no model to predict with; call audit_preferences with the same arguments "
                "and output_dir, which goes on with it."
            )
        return self._lookahead.predictions_on(rows)

    def attach_lookahead(self, lookahead: AuditLookahead) -> None:
        """Compute and keep every feature's predicted changes, unless this very lookahead was kept before."""
        self._lookahead = lookahead
        if self._store.has(LOOKAHEAD) and self._store.read_arrays(LOOKAHEAD)[1] == lookahead.description:
            return
        arrays = lookahead.predictions()
        places, answers = lookahead.places.of_all_processes()
        self._ranked = self._lines = None
        if PartialState().is_main_process:
            if self.manifest["settings"]["activations"]:
                keep_generations(self._store, lookahead.tokenizer, places, answers)
            self._store.write_arrays(LOOKAHEAD, arrays, lookahead.description)
            self._store.remove(_INFLUENCE)
            self._store.remove(FAMILIES)
        PartialState().wait_for_everyone()

    def answers(self) -> pd.DataFrame:
        """What an audit of a reward was made on, one row an answer: prompt, completion and its completion_ids, reward (NaN where none
        judged it), advantage, and group, the number of its prompt. `row` in other tables is the number of the row here. Empty for
        an audit of pairs.

        Raises:
            AuditError: the file is damaged.
        """
        return pd.DataFrame(read_answers(self._store))

    def keep_answers(self, rows: list[dict[str, Any]]) -> None:
        """Keep with a finished audit the answers that it was made on."""
        if PartialState().is_main_process and not self._store.has(ANSWERS):
            keep_answers(self._store, rows)
        PartialState().wait_for_everyone()

    def rows(self) -> np.ndarray:
        """Number in the data of each example [n]."""
        return np.concatenate([part.row for part in self._store.parts()])

    def digests(self) -> np.ndarray:
        """SHA-256 of what TRL reads of every row of the data, audited or set aside: [rows, 32] uint8."""
        return self._store.all_digests()

    def examples(self, features: Sequence[int]) -> pd.DataFrame:
        """Long format, one row an example, side and feature: row (number in the data), side, feature, attribution
        (its part of the whole: the column adds up to the feature's), activation (mean over the answer's tokens),
        max_activation, activation_attribution, length (answer tokens), log_prob.

        Raises:
            AuditError: for a feature that the dictionary does not have.
        """
        directions = self._directions(features)
        activations = self.manifest["settings"]["activations"]
        tables = [
            example_rows(part, features, directions, self.sides, len(self), activations)
            for part in self._store.parts()
        ]
        return pd.concat(tables, ignore_index=True)

    def __repr__(self) -> str:
        return (
            f"Audit({str(self.directory)!r}, {len(self)} examples, objective {self.manifest['loss']['objective']!r}, "
            f"dictionary {self.dictionary.name!r})"
        )
