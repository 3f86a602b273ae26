"""An audit read back: features, examples, and every example's part in any feature."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .audit_pass import ExampleArrays
from .audit_statistics import Settings, feature_statistics
from .audit_store import AuditStore, Part
from .errors import AuditError
from .flags import Flag
from .untrusted_tables import read_frame

if TYPE_CHECKING:
    from .lookahead import AnswerBatches, Lookahead
    from .rehearsal import Rehearsal

_FEATURES = "features.parquet"
_LOOKAHEAD, _INFLUENCE = "lookahead.safetensors", "influence.safetensors"
PREDICTIONS = (
    "predicted_change",
    "predicted_sampled_change",
    "predicted_presence_change",
    "rehearsed_change",
    "rehearsed_sampled_change",
    "probe_activation",
)
"""What a lookahead adds to the table of features, as far as it was asked for."""
_SIDE_COLUMNS = ("", "_active")
_ALWAYS = (
    "dictionary", "feature", "attribution", "standard_error", "p_value", "q_value", "lift", "length_q_value"
)  # fmt: skip


class Audit:
    """What an audit found: every feature's statistics, and every example's own gradient to ask more of.

    Attributes:
        directory: where it lies.
        manifest: what was audited, with what, and how much of it.
        dictionary: the directions; without encoder.
        sides: names of the two sides, ("chosen", "rejected") for pairs.
    """

    def __init__(self, store: AuditStore) -> None:
        if not store.finished:
            raise AuditError(
                f"The audit in {store.directory} was interrupted; run the same command again, and it goes on from there."
            )
        store.check()
        self._store = store
        self.directory = store.directory
        self.manifest = store.manifest
        self.dictionary = store.dictionary()
        self.sides: tuple[str, str] = tuple(self.manifest["loss"]["sides"])
        self._frame: pd.DataFrame | None = None
        self._lookahead: Lookahead | None = None

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read an audit that was saved, or made with `output_dir`.

        Raises:
            AuditError: no audit, an unfinished or damaged one, or one of an unknown schema version.
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
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(target.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            shutil.copytree(self.directory, scratch, ignore=shutil.ignore_patterns("*.tmp", ".lock"))
            scratch.replace(target)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
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
        """One row a feature, the largest |attribution| first. Positive = the data up-weights the feature.

        attribution and its two sides, of the mean loss over the examples; standard_error of it; p_value (sign-flip
        test over examples) and q_value (Benjamini–Hochberg over features); cosine with the descent direction, share
        (its square; directions overlap, so shares do not add up) and lift (share · d_model; 1 is what a random
        direction gets); effective_examples, `(Σ|c|)²/Σc²`, the number of examples the feature rests on;
        split_half_agreement, how often two random halves of the examples agree on the sign; length_correlation of
        the examples' contributions with the difference of answer lengths, and the attribution, p and q that remain
        at equal length (least squares). With an encoder also: activation_attribution, `-Σ a_f⟨g, ∂h/∂a_f⟩`; the
        share of answers of each side in which the feature is active, their difference (disparity) with its p_value,
        mean_activation_difference and max_activation_difference, active_examples. After a lookahead:
        predicted_change, of the mean activation on the probe by one optimizer step on this data,
        probe_activation, what that mean is before, and, where answers were sampled, predicted_sampled_change, of the mean
        activation on the answers that the model gives, and predicted_presence_change, of the share of them in which the
        feature is active; after a rehearsal the same two by a whole run, rehearsed_change and
        rehearsed_sampled_change.
        """
        if self._frame is None:
            self._frame = self._cached_features()
        frame = self._frame.copy()
        if self._store.has(_LOOKAHEAD):
            order = frame["feature"].to_numpy()
            arrays, _ = self._store.read_arrays(_LOOKAHEAD)
            for name in PREDICTIONS:
                if name in arrays:
                    if arrays[name].shape != order.shape:
                        raise AuditError(
                            f"{name!r} of the lookahead in {self.directory} has shape {arrays[name].shape}, and there are "
                            f"{len(order)} features; delete {_LOOKAHEAD} and look ahead again."
                        )
                    frame[name] = arrays[name][order]
        return frame

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
            pooling: "mean" over the answer's tokens, or "max", the activation largest in size: whether a feature occurs
                in an answer at all, however long it is.

        Raises:
            AuditError: for an audit without activations.
        """
        self._check_activations(features)
        parts = [
            _signed_sum(part.arrays, part.arrays.mean if pooling == "mean" else part.arrays.extreme, features)
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
            _dense(part.arrays, part.arrays.effect, features).reshape(*part.arrays.side.shape, -1).sum(1)
            for part in self._store.parts()
        ]
        return np.concatenate(parts) / len(self)

    def _check_activations(self, features: Sequence[int]) -> None:
        self._directions(features)
        if not self.manifest["settings"]["activations"]:
            raise AuditError("This audit has no activations; make it again with activations=True.")

    def influence(self, flags: Iterable[Flag]) -> pd.DataFrame:
        """What each example adds to the predicted change of flagged features, one row an example and flag.

        Columns row, feature, label, influence; over the rows, and with what momentum and weight decay do besides, it
        adds up to the feature's predicted_change. Kept with the audit once computed.

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
        if not self._store.has(_LOOKAHEAD):
            raise AuditError("This audit has no influence; pass lookahead= to audit_preferences.")
        known = self._store.read_arrays(_INFLUENCE)[0] if self._store.has(_INFLUENCE) else {}
        if any(values.shape != (len(self),) for values in known.values()):
            raise AuditError(
                f"{_INFLUENCE} in {self.directory} is not of {len(self)} examples; delete it and audit again."
            )
        missing = [feature for feature in features if str(feature) not in known]
        if missing:
            known = {**known, **self._new_influences(missing)}
            self._store.write_arrays(_INFLUENCE, known, {})
        return np.stack([known[str(feature)] for feature in features], axis=1)

    def _new_influences(self, features: Sequence[int]) -> dict[str, np.ndarray]:
        if self._lookahead is None:
            raise AuditError(
                f"The influence on feature {features[0]} was not computed when the audit was made, and needs the model: call "
                "audit_preferences with the same arguments and output_dir, then ask again."
            )
        return {str(feature): self._lookahead.influence(feature)[0].double().numpy() for feature in features}

    def look_ahead(
        self,
        lookahead: Lookahead,
        description: dict[str, Any],
        rehearsal: Rehearsal | None = None,
        answers: AnswerBatches | None = None,
    ) -> None:
        """Compute and keep every feature's predicted changes, unless this very lookahead was kept before."""
        self._lookahead = lookahead
        if self._store.has(_LOOKAHEAD) and self._store.read_arrays(_LOOKAHEAD)[1] == description:
            return
        from .rehearsal import look_ahead

        found = look_ahead(lookahead, rehearsal, answers)
        arrays = {name: value.cpu().double().numpy() for name, value in found.items()}
        self._store.write_arrays(_LOOKAHEAD, arrays, description)
        self._store.remove(_INFLUENCE)

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
        tables = [self._example_rows(part, features, directions) for part in self._store.parts()]
        return pd.concat(tables, ignore_index=True)

    def _example_rows(self, part: Part, features: Sequence[int], directions: np.ndarray) -> pd.DataFrame:
        arrays, k = part.arrays, len(features)
        n, per_example = arrays.side.shape
        attribution = -(arrays.gradient.reshape(n * per_example, -1) @ directions.T) / len(self)
        names = np.where(arrays.side.reshape(-1) > 0, *self.sides)
        table = {
            "row": np.repeat(part.row, per_example * k),
            "side": np.repeat(names, k),
            "feature": np.tile(np.asarray(features), n * per_example),
            "attribution": attribution.reshape(-1),
        }
        if self.manifest["settings"]["activations"]:
            table["activation"] = _dense(arrays, arrays.mean, features).reshape(-1)
            table["max_activation"] = _dense(arrays, arrays.extreme, features).reshape(-1)
            table["activation_attribution"] = _dense(arrays, arrays.effect, features).reshape(-1) / len(self)
        table["length"] = np.repeat(arrays.length.reshape(-1), k)
        table["log_prob"] = np.repeat(arrays.log_prob.reshape(-1), k)
        return pd.DataFrame(table)

    def _directions(self, features: Sequence[int]) -> np.ndarray:
        for feature in features:
            if not 0 <= feature < self.dictionary.d_sae:
                raise AuditError(
                    f"Feature {feature} is not in dictionary {self.dictionary.name!r}, which has features 0 to "
                    f"{self.dictionary.d_sae - 1}."
                )
        return self.dictionary.rows(features).numpy()

    def _cached_features(self) -> pd.DataFrame:
        path = self.directory / _FEATURES
        if path.is_file():
            return self._read_features(path)
        settings = Settings(seed=self.manifest["settings"]["seed"])
        frame = feature_statistics(self._store.parts, self.dictionary, len(self), settings)
        frame = frame.rename(columns=self._side_names())
        frame.insert(0, "dictionary", self.dictionary.name)
        order = np.argsort(-frame["attribution"].abs().to_numpy(), kind="stable")
        frame = frame.iloc[order].reset_index(drop=True)
        self._write_features(frame)
        return frame

    def _read_features(self, path: Path) -> pd.DataFrame:
        try:
            frame = read_frame(path, rows=self.dictionary.d_sae, columns=_ALWAYS)
            numbers = frame["feature"].to_numpy()
            if numbers.dtype != np.int64 or (np.sort(numbers) != np.arange(len(numbers))).any():
                raise ValueError("its features are not those of the dictionary")
            texts = frame.drop(columns="dictionary").select_dtypes(exclude="number")
            if len(texts.columns):
                raise ValueError(f"its column {texts.columns[0]!r} is not of numbers")
        except (OSError, ValueError) as error:
            raise AuditError(
                f"{path} cannot be read ({error}); delete it, and it is made again from the parts of the audit."
            ) from error
        return frame.assign(dictionary=self.dictionary.name)

    def _write_features(self, frame: pd.DataFrame) -> None:
        content = io.BytesIO()
        frame.to_parquet(content, index=False, write_page_checksum=True)
        self._store.write_table(_FEATURES, content.getvalue())

    def _side_names(self) -> dict[str, str]:
        return {
            f"{generic}{suffix}": f"{name}{suffix}"
            for generic, name in zip(("positive", "negative"), self.sides, strict=True)
            for suffix in _SIDE_COLUMNS
        }

    def __repr__(self) -> str:
        return (
            f"Audit({str(self.directory)!r}, {len(self)} examples, objective {self.manifest['loss']['objective']!r}, "
            f"dictionary {self.dictionary.name!r})"
        )


def _dense(arrays: ExampleArrays, values: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """Stored values of some features, 0 where not active: [answers, features]."""
    owner = np.repeat(np.arange(arrays.side.size), np.diff(arrays.indptr))
    table = np.zeros((arrays.side.size, len(features)), np.float32)
    for column, feature in enumerate(features):
        here = arrays.feature == feature
        table[owner[here], column] = values[here]
    return table


def _signed_sum(arrays: ExampleArrays, values: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """First answer less second: [n, features]."""
    dense = _dense(arrays, values, features).reshape(*arrays.side.shape, len(features))
    sign = arrays.side if arrays.side.shape[1] == 2 else np.ones_like(arrays.side)
    return (dense * sign[:, :, None]).sum(1)
