"""An audit on disk: a manifest, the dictionary's directions, and one file for every few hundred rows of the data.

A part is whole or absent, so an interrupted audit is continued by leaving out the parts that are there. Nothing
grows with the data but the number of parts. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .audit_files import audit_key, check_manifest, check_part, unsealed_part
from .audit_pass import ExampleArrays
from .dictionary import FeatureDictionary
from .errors import AuditError
from .record_files import sync_directory, temporary, write_durably
from .untrusted import is_inside, read_json
from .untrusted_tables import sealed

SCHEMA = 2
MANIFEST = "manifest.json"
_DECODER = "decoder.safetensors"
_PARTS = "parts"
_ARRAYS = tuple(field.name for field in fields(ExampleArrays))


@dataclass
class Part:
    """Consecutive rows of the data.

    Attributes:
        row: number in the data of each example [n], ascending.
        digest: SHA-256 of what TRL reads of every row, set aside or not [rows, 32] uint8.
        set_aside: (row, reason) of the rows that are no examples.
        arrays: of the n examples.
        notes: counts worth a warning, such as {"truncated": 3}.
    """

    row: np.ndarray
    digest: np.ndarray
    set_aside: list[tuple[int, str]]
    arrays: ExampleArrays
    notes: dict[str, int]


class AuditStore:
    """The directory of one audit.

    Raises:
        AuditError: a directory that holds something else, an audit of an unknown schema version, or a damaged one.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def create(cls, directory: Path, header: Mapping[str, Any], dictionary: FeatureDictionary) -> AuditStore:
        """A new audit, or the one in `directory` if it was begun with the same header and not finished."""
        if (directory / MANIFEST).is_file():
            return cls._continued(directory, header)
        if directory.exists() and any(path.name != _PARTS for path in _visible(directory)):
            raise AuditError(f"{directory} is not empty and holds no audit; choose a new or empty directory.")
        (directory / _PARTS).mkdir(parents=True, exist_ok=True)
        _write_decoder(directory / _DECODER, dictionary.decoder)
        store = cls(directory, {"schema": SCHEMA, "status": "running", **header})
        store._write_manifest()
        return store

    @classmethod
    def _continued(cls, directory: Path, header: Mapping[str, Any]) -> AuditStore:
        store = cls.open(directory)
        for name, value in header.items():
            if name != "versions" and store.manifest.get(name) != _as_json(value):
                raise AuditError(
                    f"{directory} holds an audit made with another {name.replace('_', ' ')}; choose another output_dir "
                    "to keep both, or delete it."
                )
        return store

    @classmethod
    def open(cls, directory: Path) -> AuditStore:
        path = directory / MANIFEST
        if not path.is_file():
            raise AuditError(f"{directory} holds no audit: it has no {MANIFEST}.")
        try:
            manifest = read_json(path)
        except (OSError, ValueError) as error:
            raise AuditError(
                f"{path} is damaged ({error}); restore it from a copy or audit again."
            ) from error
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            found = manifest.get("schema") if isinstance(manifest, dict) else None
            raise AuditError(
                f"The audit in {directory} has schema version {found}, and this version of trl-sae-audit reads {SCHEMA}; "
                "read it with the version that wrote it."
            )
        try:
            check_manifest(manifest)
        except ValueError as error:
            raise AuditError(
                f"{path} is damaged ({error}); restore it from a copy or audit again."
            ) from error
        return cls(directory, manifest)

    @property
    def finished(self) -> bool:
        return self.manifest["status"] == "finished"

    def existing_parts(self) -> set[int]:
        """Numbers of the parts on disk."""
        found = (self.directory / _PARTS).glob("[0-9]*.safetensors")
        return {int(path.stem) for path in found if path.stem.isdecimal()}

    def write_part(self, number: int, part: Part) -> None:
        arrays = {name: np.ascontiguousarray(getattr(part.arrays, name)) for name in _ARRAYS}
        arrays |= {"row": part.row.astype(np.int64), "digest": part.digest}
        described = {"audit": audit_key(_as_json(self.manifest)), "notes": part.notes}
        _write(self._path(number), sealed(arrays, described | {"set_aside": _as_json(part.set_aside)}))

    def read_part(self, number: int) -> Part:
        arrays, described = unsealed_part(self._inside(self._path(number)))
        self._check_part(number, arrays, described)
        return Part(
            row=arrays["row"],
            digest=arrays["digest"],
            set_aside=[(row, reason) for row, reason in described["set_aside"]],
            arrays=ExampleArrays(**{name: arrays[name] for name in _ARRAYS}),
            notes=described["notes"],
        )

    def digests(self, number: int) -> np.ndarray:
        """Of every row of a part, without reading the rest."""
        return unsealed_part(self._inside(self._path(number)), ("digest",))[0]["digest"]

    def parts(self) -> Iterator[Part]:
        """Every part of a finished audit, in order; one at a time in memory."""
        for number in range(self.manifest["parts"]):
            yield self.read_part(number)

    def all_digests(self) -> np.ndarray:
        """[rows, 32] uint8."""
        parts = [self.digests(number) for number in range(self.manifest["parts"])]
        for number, part in enumerate(parts):
            if part.dtype != np.uint8 or part.ndim != 2 or part.shape[1] != 32:
                raise AuditError(
                    f"{self._path(number)} has digests of shape {part.shape}; restore it from a copy."
                )
        return np.concatenate(parts) if parts else np.zeros((0, 32), np.uint8)

    def dictionary(self) -> FeatureDictionary:
        """Directions and hook point; no encoder. The rows are mapped into memory, not read."""
        info = self.manifest["dictionary"]
        path = self._inside(self.directory / _DECODER)
        decoder = _read_decoder(path)
        if decoder.shape != (info["d_sae"], info["d_model"]) or not decoder.is_floating_point():
            raise AuditError(
                f"{path} has a decoder {decoder.dtype} {tuple(decoder.shape)}, which is not the manifest's; restore both from a "
                "copy."
            )
        found = FeatureDictionary(
            decoder,
            info["hook_point"],
            info["name"],
            model_name=info["model_name"],
            neuronpedia_id=info["neuronpedia_id"],
        )
        if (
            found.identity != info["identity"] and decoder.dtype == torch.float32
        ):  # kept shorter, it has another
            raise AuditError(
                f"{path} is damaged, its content hash is not the manifest's; restore it from a copy."
            )
        found.identity = info["identity"]
        return found

    def finish(self, parts: int, processes: int) -> None:
        """All parts are there: count, hash, and say so.

        Raises:
            AuditError: a part is missing, or the data had no examples.
        """
        missing = set(range(parts)) - self.existing_parts()
        if missing:
            raise AuditError(f"{self.directory} lacks part {min(missing)}; run the audit again to make it.")
        self.manifest["parts"] = parts
        digest, examples = hashlib.sha256(), 0
        notes: dict[str, int] = {}
        set_aside: list[tuple[int, str]] = []
        for part in self.parts():
            digest.update(part.digest.tobytes())
            examples += len(part.row)
            set_aside += part.set_aside
            for name, count in part.notes.items():
                notes[name] = notes.get(name, 0) + count
        seen = self.all_digests()
        notes["duplicates"] = len(seen) - len(np.unique(seen.view("V32")))
        if examples == 0:
            raise AuditError(
                f"No example is left to audit: {len(set_aside)} rows were set aside, the first because it "
                f"{set_aside[0][1]}."
                if set_aside
                else "The dataset is empty; give at least one pair."
            )
        self.manifest |= {
            "status": "finished",
            "processes": processes,
            "rows": len(seen),
            "examples": examples,
            "dataset_sha256": digest.hexdigest(),
            "set_aside": set_aside,
            "notes": notes,
        }
        self._write_manifest()

    def write_table(self, name: str, content: bytes) -> None:
        """A file beside the parts, such as a cached table of features."""
        _write(self.directory / name, content)

    def has(self, name: str) -> bool:
        """Whether there is a file of that name beside the parts."""
        return (self.directory / name).is_file()

    def write_arrays(
        self, name: str, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]
    ) -> None:
        """Arrays in a file beside the parts, and what they are."""
        _write(self.directory / name, sealed(arrays, _as_json(description)))

    def read_arrays(self, name: str) -> tuple[dict[str, np.ndarray], Any]:
        """What `write_arrays` wrote."""
        return unsealed_part(self._inside(self.directory / name))

    def remove(self, name: str) -> None:
        """Delete a file beside the parts, if it is there."""
        (self.directory / name).unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        _write(self.directory / MANIFEST, json.dumps(self.manifest, indent=2, default=str).encode())

    def _path(self, number: int) -> Path:
        return self.directory / _PARTS / f"{number:06d}.safetensors"

    def _inside(self, path: Path) -> Path:
        if not is_inside(self.directory, str(path.relative_to(self.directory))):
            raise AuditError(
                f"{path} of the audit leads out of its directory; it was tampered with, so do not use it."
            )
        return path

    def _check_part(
        self, number: int, arrays: Mapping[str, np.ndarray], described: Mapping[str, Any]
    ) -> None:
        try:
            check_part(arrays, described, _as_json(self.manifest))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise AuditError(
                f"{self._path(number)} is no part of this audit ({error}); restore it from a copy, or delete it and audit "
                "again with the same output_dir."
            ) from error

    def check(self) -> None:
        """Hold the rows of the parts against what the manifest of a finished audit says of them.

        Raises:
            AuditError: they are not those that were counted and hashed at the end of the audit.
        """
        seen = self.all_digests()
        if len(seen) != self.manifest["rows"] or _sha256(seen) != self.manifest["dataset_sha256"]:
            raise AuditError(
                f"The parts of the audit in {self.directory} are not those its {MANIFEST} was written for; restore it from a "
                "copy or audit again."
            )


def dictionary_header(dictionary: FeatureDictionary) -> dict[str, Any]:
    """What a manifest keeps of a dictionary."""
    return asdict(dictionary.info)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _visible(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if not path.name.startswith(".")]


def _unreadable(path: Path, error: Exception) -> AuditError:
    return AuditError(
        f"{path} of the audit cannot be read ({error}); restore it from a copy, or delete it and audit again with "
        "the same output_dir."
    )


def _sha256(digests: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(digests).tobytes()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with _whole_or_absent(path):
        write_durably(path, content)


def _write_decoder(path: Path, decoder: torch.Tensor) -> None:
    """The rows as they are kept, however many gigabytes, without a copy in memory."""
    with _whole_or_absent(path):
        temporary(path).unlink(missing_ok=True)
        save_file({"decoder": decoder.cpu().contiguous()}, temporary(path))
        with temporary(path).open("rb+") as file:
            os.fsync(file.fileno())
        temporary(path).replace(path)


def _read_decoder(path: Path) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("decoder")
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[None]:
    try:
        yield
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        temporary(path).unlink(missing_ok=True)
        raise AuditError(
            f"{path} could not be written ({error}); make room or choose another directory, and run the audit "
            "again: it goes on from where it stopped."
        ) from error
