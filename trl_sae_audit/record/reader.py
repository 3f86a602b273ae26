"""Reading a run record back: what the run taught, feature by feature and step by step."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa

from ..attribution.totals import FeatureTotals
from ..errors import AuditError
from ..io.dictionaries import describe_place
from ..io.feature_labels import LabelSet, labels_of, with_labels
from ..io.manifest import StoredFile, reading, stored_files
from ..statistics import effect_unit, least_effect_unit
from ..text import sanitize
from . import files
from .columns import check_columns
from .contexts import COLUMNS, CONTEXTS, WORDS, feature_words, strongest_contexts
from .leading import LEADINGS
from .manifest import TOTALS, files_by_table, read_manifest

Score = Literal["attribution", "selection", "activation", "frequency"]
"""What a record keeps of every feature over time."""

_STORED_SIDES = ["positive", "negative"]
_PAIR = ["chosen", "rejected"]
_DRIFT, _DRIFT_FEATURES = "generation_drift", "generation_features"
_PRINTED = 10
_COLUMNS = ("feature", "label", "generation_effect_size", "selection", "selection_z", "attribution", "words")
_ATTEMPTS = 200
"""Manifests to try while a writer keeps replacing them; one read against one flush, so two nearly always do."""


class RunRecord:
    """One run's record, as it was at the moment it was loaded; a run that is still writing does not disturb it.

    Attributes:
        directory: where it was read from.
        manifest: `manifest.json` as a dict.
        status: "running" (or killed), "finished" or "failed".
        last_step: the rows and the totals cover exactly the optimizer steps 1 … last_step.
        dictionaries: one dict a dictionary: name, identity, hook_point, d_sae, d_model …
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self.status: str = manifest["status"]
        self.last_step: int = manifest["last_step"]
        self.dictionaries: list[dict[str, Any]] = manifest["dictionaries"]
        self._files = files_by_table(manifest)
        self._contents = _read_all(directory, stored_files(manifest))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RunRecord":
        """Read the record in the directory `path`, also while a run is writing to it.

        Raises:
            AuditError: no record, one of an unknown format, or one with a missing, truncated or corrupt
                file, which is named.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        for _ in range(_ATTEMPTS):
            try:
                return cls(directory, manifest)
            except AuditError:
                newer = read_manifest(directory)
                if newer["flushes"] == manifest["flushes"]:
                    raise
                manifest = newer
        return cls(directory, manifest)

    def __str__(self) -> str:
        """The run in a line, and its first features by dictionary, with words."""
        parts = [
            f"{self.manifest.get('trainer') or 'a trainer'} of {self.manifest.get('model') or 'a model without a name'}: {self.status}, {self.last_step:,} optimizer steps ({self.directory})"
        ]
        for dictionary in self.dictionaries:
            table = self.features(dictionary["name"]).head(_PRINTED)
            shown = [name for name in _COLUMNS if name in table and table[name].notna().any()]
            if not table["label"].any():
                shown.remove("label")
            lines = table[shown].to_string(
                index=False, max_colwidth=48, na_rep="–", float_format="{:+.3g}".format
            )
            parts.append(f"{dictionary['name']} at {describe_place(dictionary)}\n{lines}")
        return "\n\n".join("\n".join(map(sanitize, part.splitlines())) for part in parts)

    def table(self, name: str) -> pd.DataFrame:
        """All rows of a table, in the order they were written and with the columns that are stored.

        Raises:
            AuditError: the run wrote no such table, or a part of it cannot be read.
        """
        if name not in self.tables:
            raise AuditError(f"The record in {self.directory} has no table {name!r}: it has {self.tables}.")
        parts = [
            files.parse_part(self.directory / stored.file, stored, self._contents[stored.file])
            for stored in self._files[name]
        ]
        if not parts:
            return pd.DataFrame()
        rows = pa.concat_tables(parts, promote_options="permissive").to_pandas()
        check_columns(rows, name, self.directory)
        return rows

    @property
    def tables(self) -> list[str]:
        """Names of the tables the run wrote."""
        return sorted(self._files.keys() - {TOTALS})

    @property
    def sides(self) -> dict[str, str]:
        """Columns of the loss's two sides in `steps` and `features` → the trainer's own names; empty where it has none.

        The columns are `chosen` and `rejected` in a run on pairs, and `positive` and `negative`, as they are stored, in
        any other.
        """
        names = self.manifest.get("sides") or []
        columns = _PAIR if names == _PAIR else _STORED_SIDES
        return dict(zip(columns, names, strict=False))

    def steps(self, dictionary: str | None = None) -> pd.DataFrame:
        """Long format, one row a step, dictionary and feature that was watched or in the step's top k; see `sides`.

        Args:
            dictionary: name of the only dictionary to show; all of them otherwise.
        """
        rows = self._name_sides(self.table("steps"))
        if dictionary is None:
            return rows
        self._described(dictionary)
        return rows[rows["dictionary"] == dictionary].reset_index(drop=True)

    def totals(self, dictionary: str | None = None) -> FeatureTotals:
        """The running totals of a dictionary at `last_step`; its name may be omitted if there is only one."""
        place = self.dictionaries.index(self._described(dictionary))
        if TOTALS not in self._files:
            raise AuditError(
                f"The record in {self.directory} has no totals yet, for the run ended or is still before its first "
                "flush: wait for it, or run again."
            )
        stored = self._files[TOTALS][place]
        return files.parse_totals(self.directory / stored.file, stored, self._contents[stored.file])

    def features(self, dictionary: str | None = None) -> pd.DataFrame:
        """One row a feature; q-values are within a dictionary.

        The first is the feature that has moved most in what the model generates (largest |generation_effect_size|); where that is not
        known, the one that the run selected for or against most, in units of the standard error, or that of the largest |attribution|.

        Columns: dictionary, feature, label (of a watched feature what the user called it, else from `labels.json`), with
        label_accuracy and label_accuracy_low as in `Audit.features`, words (the phrases around the places where the feature
        is most active in the responses, see `contexts`; empty where selection is not recorded), and those of `FeatureTotals.frame`,
        whose notes on the standard errors apply; for those of the loss's sides see `sides`. In a run with `generations` also
        `generation_drift` at the last look, with its 95 % interval `generation_drift_low` to `generation_drift_high`, and
        `generation_effect_size`, the drift in units of the standard deviation over answers of the start (of `statistics.effect_unit`,
        as in an audit); NaN for features that no sampled answer shows.

        Args:
            dictionary: name of the only dictionary to show; all of them otherwise.
        """
        shown = self.dictionaries if dictionary is None else [self._described(dictionary)]
        frames = [self._features(described) for described in shown]
        table = pd.concat(frames, ignore_index=True)
        by = [leading.order for leading in LEADINGS]
        order = table.reindex(columns=by).abs().sort_values(by, ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)

    def model_card(
        self,
        *,
        n: int = 5,
        audit: str | os.PathLike[str] | None = None,
        filtered: str | os.PathLike[str] | None = None,
        shaped: str | os.PathLike[str] | None = None,
        verified: str | os.PathLike[str] | None = None,
    ) -> str:
        """Markdown for a model card, see `record.model_card`: what the run taught, on what data, and what was done about it."""
        from .model_card import model_card

        return model_card(self, n=n, audit=audit, filtered=filtered, shaped=shaped, verified=verified)

    def drift(self, dictionary: str | None = None) -> pd.DataFrame:
        """What the model generates, against the start: change of each feature's mean activation, steps × features.

        A column for each feature that is active in the answers sampled at the start, or again at the end; NaN in a look whose answers
        do not show it, and so say nothing of it. The intervals, and how much each look is to be trusted, are in the tables
        `generation_drift` and `generation_looks`.

        Args:
            dictionary: its name; may be omitted if there is only one.

        Raises:
            AuditError: a run without `generations`, or before its first look.
        """
        rows = self._drift_rows(self._described(dictionary)["name"])
        if rows is None:
            raise AuditError(
                f"The record in {self.directory} has no drift in generations: pass generations=Sampling(answers=4) to "
                "FeatureAttributionCallback, and wait for the first look."
            )
        with reading(self.directory / "generation_drift"):
            return rows.pivot(index="step", columns="feature", values="drift")

    def drift_effects(self, dictionary: str | None = None) -> pd.DataFrame | None:
        """`drift` as an effect size, see `features`, by step and feature; None without any look.

        Args:
            dictionary: its name; may be omitted if there is only one.
        """
        name = self._described(dictionary)["name"]
        rows = self._drift_rows(name)
        if rows is None:
            return None
        drift = rows.pivot(index="step", columns="feature", values="drift")
        return drift / self._effect_unit(name, drift.columns)

    def curriculum(self, dictionary: str | None = None, score: Score = "attribution") -> pd.DataFrame:
        """A score's mean per step, time bins × features; the index is each bin's (first_step, last_step).

        Args:
            dictionary: its name; may be omitted if there is only one.
            score: "attribution" or "selection"; and, where the responses are the model's own, "activation" and "frequency",
                the feature's mean activation over the response tokens and the share of them on which it is active.

        Raises:
            AuditError: the run did not record the score.
        """
        totals = self.totals(dictionary)
        maps = {name: each.curriculum for name, each in totals.scores.items()} | totals.rollouts
        if score not in maps:
            raise AuditError(
                f"The record in {self.directory} has no {score!r} over time: it has {', '.join(map(repr, maps))}."
            )
        return maps[score].frame()

    def _features(self, described: dict[str, Any]) -> pd.DataFrame:
        frame = self._name_sides(self.totals(described["name"]).frame(described["d_model"]))
        labels: dict[int, str] = {}
        for label, feature in (
            self.manifest.get("config", {}).get("watch", {}).get(described["name"], {}).items()
        ):
            labels[feature] = f"{labels[feature]}, {label}" if feature in labels else label
        latest = self._latest_drift(described["name"])
        if latest is not None:
            frame = frame.join(latest, on="feature")
        frame.insert(0, "dictionary", described["name"])
        frame.insert(2, "words", self.words(frame["feature"], described["name"]))
        with_labels(
            frame, self.labels(described["name"]), [labels.get(each, "") for each in frame["feature"]]
        )
        return frame

    def labels(self, dictionary: str | None = None) -> LabelSet:
        """The labels that `labels.json` has of a dictionary's features, see `make_labels`.

        Args:
            dictionary: its name; may be omitted if there is only one.

        Raises:
            AuditError: the file is damaged.
        """
        described = self._described(dictionary)
        return labels_of(self.directory, described["name"], described["identity"])

    def contexts(self, features: Iterable[int] | None = None, dictionary: str | None = None) -> pd.DataFrame:
        """Where some features, or all, were most active in the responses that the run trained on, by feature, the strongest first.

        Columns: feature; source, the response's side in a run on pairs, otherwise "response"; step, the latest when the place was
        written down; activation there; prompt, the end of the prompt; before, at and after, the text around the place. Of each
        micro-batch a feature has one place. Empty where selection was not recorded.

        Args:
            features: to look at; all by default.
            dictionary: its name; may be left out if there is one only.
        """
        name = self._described(dictionary)["name"]
        if CONTEXTS not in self.tables:
            return pd.DataFrame({column: [] for column in COLUMNS})
        found = strongest_contexts(self.table(CONTEXTS), name)
        return (
            found if features is None else found[found["feature"].isin(list(features))].reset_index(drop=True)
        )

    def words(self, features: Iterable[int], dictionary: str | None = None) -> list[str]:
        """The column `words` of some features, see `features`."""
        name = self._described(dictionary)["name"]
        if CONTEXTS not in self.tables:
            return ["" for _ in features]
        known = self.table(WORDS) if WORDS in self.tables else None
        found = feature_words(self.table(CONTEXTS), known, name)
        return [found.get(int(feature), "") for feature in features]

    def _drift_rows(self, name: str) -> pd.DataFrame | None:
        if _DRIFT not in self.tables:
            return None
        rows = self.table(_DRIFT)
        # a run that was stopped at a step that it had looked at may have looked again, see GenerationDrift.look_at_end
        return rows[rows["dictionary"] == name].drop_duplicates(["step", "feature"], keep="last")

    def _latest_drift(self, name: str) -> pd.DataFrame | None:
        """The last look, by feature."""
        rows = self._drift_rows(name)
        if rows is None:
            return None
        rows = rows[rows["step"] == rows["step"].max()].set_index("feature")
        return pd.DataFrame(
            {
                "generation_drift": rows["drift"],
                "generation_drift_low": rows["low"],
                "generation_drift_high": rows["high"],
                "generation_effect_size": rows["drift"] / self._effect_unit(name, rows.index),
            }
        )

    def _effect_unit(self, name: str, features: pd.Index) -> pd.Series:
        """By feature, of the standard deviation of its mean activation over the answers of the start; NaN where that is 0."""
        answers = self.table(_DRIFT_FEATURES)
        spread = answers[answers["dictionary"] == name].set_index("feature")["spread"]
        values = spread.to_numpy(float)
        known = pd.Series(effect_unit(values), spread.index)
        return known.reindex(features).where(features.isin(known.index), least_effect_unit(values))

    def _name_sides(self, frame: pd.DataFrame) -> pd.DataFrame:
        shown = dict(zip(_STORED_SIDES, self.sides, strict=False))
        shown |= {f"selection_{stored}": f"selection_{side}" for stored, side in shown.items()}
        return frame.rename(columns=shown)

    def _described(self, name: str | None) -> dict[str, Any]:
        names = [entry["name"] for entry in self.dictionaries]
        if name is None and len(names) > 1:
            raise AuditError(f"The record in {self.directory} has several dictionaries: name one of {names}.")
        if name is not None and name not in names:
            raise AuditError(
                f"The record in {self.directory} has no dictionary {name!r}: name one of {names}."
            )
        return self.dictionaries[0 if name is None else names.index(name)]


def _read_all(directory: Path, stored: Iterable[StoredFile]) -> dict[str, bytes]:
    """The checked content of every file. All are opened before any is read: an open file survives its deletion."""
    with ExitStack() as opened:
        handles = [(each, opened.enter_context(each.open(directory))) for each in stored]
        return {each.file: each.read_from(directory, handle) for each, handle in handles}
