"""`manifest.json`: the only thing that says which files belong to a run record.

A record is a directory with tables cut into Parquet parts (`steps/000007.parquet`) and one safetensors file of
totals a dictionary (`totals/000007-0.safetensors`). A file that a manifest named is never changed and its name
is not used again: a flush writes new files, then replaces the manifest, then deletes the old ones. Hence,
whatever instant a process dies at, the manifest on disk names a complete, matching set.
"""

import json
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from trl_sae_audit.errors import AuditError
from trl_sae_audit.untrusted import is_inside, read_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STATUSES = ("running", "finished", "failed")
DICTIONARY_KEYS = {"name": str, "identity": str, "hook_point": str, "d_sae": int, "d_model": int}
_PACKAGES = (
    "trl-sae-audit", "torch", "transformers", "trl", "peft", "accelerate", "sae-lens", "datasets", "numpy", "pyarrow"
)  # fmt: skip
_TOO_MANY = 2**53
_OWN_KEYS = ("schema_version", "created", "status", "last_step", "flushes", "tables", "totals", "extra")


@dataclass(frozen=True)
class StoredFile:
    """One file of a record: its path in the directory, with forward slashes, and what it must look like."""

    file: str
    bytes: int
    crc32: int
    rows: int
    """Rows of a part; features of a totals file."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; the only thing that says which files belong to a record."""

    header: dict[str, Any]
    """What the run said about itself: versions, trainer, model, dictionaries, arguments, watch …"""
    created: str
    status: str = "running"
    last_step: int = 0
    """Rows and totals on disk cover exactly the steps up to this one."""
    flushes: int = 0
    """Times the record was written; numbers the files."""
    tables: dict[str, list[StoredFile]] = field(default_factory=dict)
    totals: dict[str, StoredFile] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def files(self) -> list[StoredFile]:
        """Every file of the record but the manifest itself."""
        return [part for parts in self.tables.values() for part in parts] + list(self.totals.values())

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `manifest.json`, the header's keys beside the record's own."""
        fields = {"schema_version": SCHEMA_VERSION, **self.header, **asdict(self)}
        del fields["header"]
        return fields

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`."""
        return (
            json.dumps(plain(self.to_dict()), indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        )


def now() -> str:
    """This moment, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy scalars as numbers, whatever JSON has no word for as its text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def check_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as the manifest will hold it.

    Raises:
        AuditError: a dictionary is described incompletely or twice, `watch` is not `{dictionary: {label:
            feature}}`, or a key is one of the manifest's own.
    """
    checked = plain(header)
    clash = sorted(set(checked) & set(_OWN_KEYS))
    if clash:
        raise AuditError(f"the run's header uses {clash}, which the record writes itself: rename them.")
    dictionaries = checked.get("dictionaries")
    if not isinstance(dictionaries, list) or not dictionaries:
        raise AuditError("the run's header names no dictionaries: give at least one under 'dictionaries'.")
    for entry in dictionaries:
        for key, kind in DICTIONARY_KEYS.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise AuditError(
                    f"a dictionary in the run's header has no {key!r}: describe it as {entry!r} with one."
                )
    names = [entry["name"] for entry in dictionaries]
    if len(set(names)) < len(names):
        raise AuditError(f"two dictionaries have the same name among {names}: give each its own name.")
    watch = checked.get("watch", {})
    if not isinstance(watch, dict) or not all(
        name in names and _is_labels(labels) for name, labels in watch.items()
    ):
        raise AuditError(
            f"watch in the run's header is {watch!r}: write it as {{dictionary name: {{label: feature number}}}}, "
            f"with dictionaries among {names}."
        )
    return checked


def _is_labels(labels: Any) -> bool:
    return isinstance(labels, dict) and all(isinstance(feature, int) for feature in labels.values())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the record in `directory`.

    Raises:
        AuditError: no record there, an unknown schema version, a damaged manifest, or one that names a file
            outside the directory.
    """
    path = directory / MANIFEST
    try:
        fields = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise AuditError(
            f"{directory} is not a run record, for it has no {MANIFEST}: pass the output_dir of a run."
        ) from None
    except OSError as error:
        raise AuditError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    except ValueError as error:
        raise AuditError(
            f"{path} is damaged, it cannot be read as JSON ({error}): restore it from a copy."
        ) from error
    if not isinstance(fields, dict) or "schema_version" not in fields:
        raise AuditError(f"{path} is not the manifest of a run record: pass the output_dir of a run.")
    if fields["schema_version"] != SCHEMA_VERSION:
        raise AuditError(
            f"{directory} is a run record of schema version {fields['schema_version']!r}, and this trl-sae-audit "
            f"reads version {SCHEMA_VERSION}: read it with the release that wrote it."
        )
    try:
        manifest = _parse(fields)
    except (KeyError, TypeError, AttributeError, AuditError) as error:
        raise AuditError(f"{path} is damaged ({error}): restore it from a copy.") from error
    for stored in manifest.files():
        _check_inside(directory, stored.file)
    return manifest


def _parse(fields: dict[str, Any]) -> Manifest:
    header = check_header({key: value for key, value in fields.items() if key not in _OWN_KEYS})
    tables = {name: [_stored_file(part) for part in parts] for name, parts in fields["tables"].items()}
    totals = {name: _stored_file(entry) for name, entry in fields["totals"].items()}
    manifest = Manifest(
        header=header,
        created=_typed(fields["created"], str),
        status=_typed(fields["status"], str),
        last_step=_typed(fields["last_step"], int),
        flushes=_typed(fields["flushes"], int),
        tables=tables,
        totals=totals,
        extra=_typed(fields["extra"], dict),
    )
    if manifest.status not in STATUSES:
        raise TypeError(f"the status {manifest.status!r} is none of {STATUSES}")
    d_sae = {entry["name"]: entry["d_sae"] for entry in header["dictionaries"]}
    for entry in header["dictionaries"]:
        for key in ("d_sae", "d_model"):
            if _typed(entry[key], int) == 0:
                raise TypeError(f"the {key} of dictionary {entry['name']!r} is {entry[key]}")
    for name, labels in header.get("watch", {}).items():
        for label, feature in labels.items():
            if not 0 <= _typed(feature, int) < d_sae[name]:
                raise TypeError(f"{label!r} is feature {feature} of {name!r}, which has {d_sae[name]}")
    sides = header.get("sides")
    if sides is not None and not (_is_texts(sides) and len(sides) == 2):
        raise TypeError(f"the sides are {sides!r}")
    for name, entry in totals.items():
        if d_sae.get(name) != entry.rows:
            raise TypeError(
                f"the totals of {name!r} have {entry.rows} features, the dictionary {d_sae.get(name)}"
            )
    return manifest


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _stored_file(entry: Any) -> StoredFile:
    numbers = {key: _typed(entry[key], int) for key in ("bytes", "crc32", "rows")}
    return StoredFile(file=_typed(entry["file"], str), **numbers)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} stands where {kind.__name__} was expected")
    if isinstance(value, int) and not 0 <= value < _TOO_MANY:
        raise TypeError(f"{value} stands where a count was expected")
    return value


def _check_inside(directory: Path, file: str) -> None:
    if not is_inside(directory, file):
        raise AuditError(
            f"the manifest in {directory} names {file!r}, which lies outside the record: it was tampered with or "
            "is damaged, so do not use it."
        )


def check_continues(directory: Path, manifest: Manifest, header: Mapping[str, Any], step: int) -> None:
    """Refuse, with an AuditError, to continue a record with other dictionaries, or beyond a gap in the steps."""
    recorded, ours = manifest.header["dictionaries"], header["dictionaries"]
    if len(ours) != len(recorded):
        raise AuditError(
            f"the record in {directory} was made with {len(recorded)} dictionaries, and the run has {len(ours)}: use "
            "the same ones, or choose another output_dir."
        )
    for before, after in zip(recorded, ours, strict=True):
        for key in DICTIONARY_KEYS:
            if before[key] != after[key]:
                raise AuditError(
                    f"the record in {directory} was made with a dictionary whose {key} is {before[key]!r}, and the "
                    f"run's has {after[key]!r}: use the same dictionaries, or choose another output_dir."
                )
    if manifest.last_step < step:
        raise AuditError(
            f"the record in {directory} ends at step {manifest.last_step}, before step {step} where the run resumes: "
            "resume from an earlier checkpoint, or choose another output_dir."
        )


def is_same_run(manifest: Manifest, header: Mapping[str, Any]) -> bool:
    """Whether a record is of a run that was asked for in the same words, wherever it was to be resumed from."""
    return _asked_for(manifest.header) == _asked_for(plain(header))


def _asked_for(header: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("trainer_class", "model", "dictionaries", "watch", "settings", "arguments")
    asked = {key: header[key] for key in keys if key in header}
    asked["arguments"] = {**asked.get("arguments", {}), "resume_from_checkpoint": None}
    return asked


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour a record depends on, without importing them."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def resumed_header(manifest: Manifest, header: dict[str, Any], step: int) -> dict[str, Any]:
    """The header of the run that goes on, with a note of when and with what it did."""
    note = {"step": step, "time": now(), "versions": package_versions()}
    versions = manifest.header.get("versions", note["versions"])
    return {"versions": versions, **header, "resumed": [*manifest.header.get("resumed", []), note]}
