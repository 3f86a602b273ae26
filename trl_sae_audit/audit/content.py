"""What the manifest of an audit says; and what can be read of an audit without torch and pandas, so that a flag is set at once."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, NonNegativeInt

from ..errors import AuditError
from ..io.feature_labels import Label, labels_of
from ..io.manifest import read_manifest, reading
from ..io.tables import load_checked, read_parquet
from ..saes.info import DictionaryInfo, describe

Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**53)]
LOOKAHEAD = "lookahead.safetensors"
FEATURES, WORDS, FAMILIES = "features.parquet", "words.parquet", "families.parquet"
MEASURED = ("attribution", "standard_error", "q_value")
_EFFECT = ("effect_size", "effect_size_low", "effect_size_high")


@dataclass(frozen=True)
class AuditLoss:
    """What is audited, at least."""

    objective: str
    sides: Annotated[list[str], Field(min_length=1, max_length=2)]


@dataclass(frozen=True)
class AuditSettings:
    """How, at least."""

    activations: bool
    seed: NonNegativeInt


@dataclass(frozen=True)
class AuditContent:
    """What the manifest of an audit says, at least; a finished one has figures."""

    status: Literal["running", "finished"]
    dictionary: DictionaryInfo
    loss: AuditLoss
    settings: AuditSettings
    parts: Count | None = None
    rows: Count | None = None
    examples: Count | None = None
    dataset_sha256: str | None = None
    notes: dict[str, Count] | None = None
    set_aside: list[tuple[Count, str]] | None = None

    def __post_init__(self) -> None:
        if self.status == "running":
            return
        if self.rows is None or self.examples is None or self.set_aside is None or self.notes is None:
            raise ValueError("it is finished and lacks rows, examples, set_aside or notes")
        if not (self.parts and self.dataset_sha256):
            raise ValueError("it is finished and has no figures")
        if self.examples + len(self.set_aside) > self.rows:
            raise ValueError(f"it has {self.examples} examples in {self.rows} rows")
        if any(row >= self.rows for row, _ in self.set_aside):
            raise ValueError(f"it sets rows aside beyond its {self.rows}")


_OF_ONE_START = {"packages", "config", "processes"}
_FIGURES = {entry.name for entry in fields(AuditContent)} - {"dictionary", "loss", "settings"}


def audit_key(manifest: Mapping[str, Any]) -> int:
    """A number for what was audited with what; a part of another audit has another."""
    left_out = {"kind", "format", *_OF_ONE_START, *_FIGURES}
    header = {name: value for name, value in manifest.items() if name not in left_out}
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def check_finished(manifest: Mapping[str, Any], directory: Path) -> None:
    """Refuse, with an AuditError, an audit that was interrupted."""
    if manifest["status"] != "finished":
        raise AuditError(
            f"The audit in {directory} was interrupted; run the same command again, and it goes on from there."
        )


def read_dictionary_info(directory: Path) -> DictionaryInfo:
    """The dictionary of a finished audit.

    Raises:
        AuditError: no audit, an unfinished or damaged one, or one of an unknown format.
    """
    manifest = read_manifest(directory, "audit", shape=AuditContent)
    check_finished(manifest, directory)
    return describe(manifest["dictionary"])


def read_feature(directory: Path, feature: int) -> dict[str, Any]:
    """A feature's row of `Audit.features()`; of what a lookahead adds, the effect size and its interval.

    Raises:
        AuditError: the table is damaged.
    """
    path = directory / FEATURES
    if not path.is_file():  # nobody has asked for the table yet
        from .result import Audit

        Audit.load(directory).features()
    with reading(path):
        table = read_parquet(path, columns=("feature", *MEASURED))
        numbers = table["feature"].to_pylist()  # as an array pyarrow would import pandas
        if numbers.count(feature) != 1:
            raise ValueError(f"it has {numbers.count(feature)} rows of feature {feature}")
        row = table.slice(numbers.index(feature), 1).to_pylist()[0]
    if (directory / LOOKAHEAD).is_file():
        with reading(directory / LOOKAHEAD):
            arrays, _ = load_checked(directory / LOOKAHEAD)
            row |= {name: float(arrays[name][feature]) for name in _EFFECT if name in arrays}
    return row


def read_family(directory: Path, number: int) -> list[int]:
    """The features of a family, see `Audit.features`, its leader first.

    Raises:
        AuditError: the audit has no such family, or the table is damaged.
    """
    path = directory / FAMILIES
    if not path.is_file():  # nobody has asked for the table yet
        from .result import Audit

        Audit.load(directory).features()
    found, last = [], 0
    if path.is_file():  # without activations there are no families
        with reading(path):
            table = read_parquet(path, columns=("feature", "family"))
            rows = zip(table["feature"].to_pylist(), table["family"].to_pylist(), strict=True)
            families = [(int(feature), int(family)) for feature, family in rows]
            last = max((family for _, family in families), default=0)
            found = [feature for feature, family in families if family == number]
    if not found or number < 1:
        raise AuditError(
            f"The audit in {directory} has no family {number}"
            + (f"; its families are 1 to {last}." if last else ", since no features move together in it.")
        )
    return found


def read_feature_label(directory: Path, dictionary: DictionaryInfo, feature: int) -> Label | None:
    """The label of a feature that a person would use: one that says something, and does not do so by chance.

    Raises:
        AuditError: the labels are damaged.
    """
    label = labels_of(directory, dictionary.name, dictionary.identity).labels.get(feature)
    return label if label is not None and label.text and not label.is_chance else None


def read_feature_words(directory: Path, feature: int) -> str:
    """The words of a feature, see `Audit.features`; empty where there are none.

    Raises:
        AuditError: the table is damaged.
    """
    path = directory / WORDS
    if not path.is_file():
        return ""
    with reading(path):
        table = read_parquet(path, columns=("feature", "words"))
        numbers = table["feature"].to_pylist()
        if feature not in numbers:
            return ""
        words = table["words"][numbers.index(feature)].as_py()
        if not isinstance(words, str):
            raise ValueError("its words are no texts")
        return words
