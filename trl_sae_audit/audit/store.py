"""An audit on disk: a manifest, the dictionary's directions, and one file for every few hundred rows of the data.

A part is whole or absent, so an interrupted audit is continued by leaving out the parts that are there. Nothing
grows with the data but the number of parts. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AuditError, DirectoryTakenError
from ..io.atomic import sync_directory, temporary, write_durably
from ..io.manifest import (
    MANIFEST,
    check_free,
    damaged,
    document,
    package_versions,
    plain,
    read_manifest,
    reading,
)
from ..io.tables import load_checked, save_checked
from ..io.untrusted import is_inside
from ..saes.dictionary import FeatureDictionary
from .content import AuditContent, audit_key
from .files import check_part
from .gradients import ExampleArrays

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
        AuditError: a directory that holds something else, an audit of an unknown format, or a damaged one.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def create(
        cls,
        directory: Path,
        header: Mapping[str, Any],
        dictionary: FeatureDictionary,
        config: Mapping[str, Any],
    ) -> AuditStore:
        """A new audit, or the one in `directory` if it was begun with the same header; `config` is how it was called."""
        if (directory / MANIFEST).exists():
            check_free(directory, "audit")
            return cls._continued(directory, header, config)
        if directory.exists() and any(path.name != _PARTS for path in _visible(directory)):
            raise AuditError(f"{directory} is not empty and holds no audit; choose a new or empty directory.")
        (directory / _PARTS).mkdir(parents=True, exist_ok=True)
        _write_decoder(directory / _DECODER, dictionary.decoder)
        store = cls(directory, {"packages": package_versions(), "status": "running", **plain(header)})
        store._set_config(config)
        return store

    @classmethod
    def _continued(cls, directory: Path, header: Mapping[str, Any], config: Mapping[str, Any]) -> AuditStore:
        store = cls.open(directory)
        for name, value in header.items():
            if store.manifest.get(name) != plain(value):
                raise DirectoryTakenError(
                    f"{directory} holds an audit made with another {name.replace('_', ' ')}; choose another output_dir "
                    "to keep both, or delete it."
                )
        store._set_config(config)
        return store

    def _set_config(self, config: Mapping[str, Any]) -> None:
        """Note how the audit was called, each time it is begun or continued."""
        if self.manifest.get("config") != plain(config):
            self.manifest["config"] = plain(config)
            self._write_manifest()

    @classmethod
    def open(cls, directory: Path) -> AuditStore:
        return cls(directory, read_manifest(directory, "audit", shape=AuditContent))

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
        described = {"audit": audit_key(self.manifest), "notes": part.notes, "set_aside": part.set_aside}
        self.write_arrays(_name(number), arrays, described)

    def read_part(self, number: int) -> Part:
        name = _name(number)
        arrays, described = self.read_arrays(name)
        with reading(self.directory / name):
            check_part(arrays, described, self.manifest)
        return Part(
            row=arrays["row"],
            digest=arrays["digest"],
            set_aside=[(row, reason) for row, reason in described["set_aside"]],
            arrays=ExampleArrays(**{name: arrays[name] for name in _ARRAYS}),
            notes=described["notes"],
        )

    def digests(self, number: int) -> np.ndarray:
        """Of every row of a part, without reading the rest."""
        found = self.read_arrays(_name(number), ("digest",))[0]["digest"]
        if found.dtype != np.uint8 or found.ndim != 2 or found.shape[1] != 32:
            raise damaged(self.directory / _name(number), f"its digests have shape {found.shape}")
        return found

    def parts(self) -> Iterator[Part]:
        """Every part of a finished audit, in order; one at a time in memory."""
        for number in range(self.manifest["parts"]):
            yield self.read_part(number)

    def prompt_states(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of the rows and states of the prompts of every part, see `PromptStates`, without reading the rest."""
        for number in range(self.manifest["parts"]):
            arrays, _ = self.read_arrays(_name(number), ("row", "prompt_state"))
            rows, states = arrays["row"], arrays["prompt_state"]
            if (
                rows.ndim != 1
                or states.ndim != 2
                or len(rows) != len(states)
                or not np.isfinite(states).all()
            ):
                raise damaged(self.directory / _name(number), "its prompts' states are not of its rows")
            if len(rows) and not (rows.min() >= 0 and rows.max() < self.manifest["rows"]):
                raise damaged(self.directory / _name(number), "its rows are not rows of the data")
            yield rows, states

    def all_digests(self) -> np.ndarray:
        """[rows, 32] uint8."""
        parts = [self.digests(number) for number in range(self.manifest["parts"])]
        return np.concatenate(parts) if parts else np.zeros((0, 32), np.uint8)

    def dictionary(self) -> FeatureDictionary:
        """Directions and hook point; no encoder. The rows are mapped into memory, not read."""
        info = self.manifest["dictionary"]
        path = self._inside(_DECODER)
        try:
            with safe_open(path, framework="pt") as file:
                decoder = file.get_tensor("decoder")
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
        if decoder.shape != (info["d_sae"], info["d_model"]) or not decoder.is_floating_point():
            raise damaged(
                path, f"it is {decoder.dtype} {tuple(decoder.shape)}, which is not the manifest's decoder"
            )
        with reading(self.directory / MANIFEST):
            found = FeatureDictionary(
                decoder,
                info["hook_point"],
                info["name"],
                model_name=info["model_name"],
                neuronpedia_id=info["neuronpedia_id"],
                reads=info.get("reads"),
            )
        if decoder.dtype == torch.float32 and found.identity != info["identity"]:
            raise damaged(path, "its content hash is not the manifest's")
        found.identity = info["identity"]  # one that is kept shorter has another
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
        examples, notes = 0, Counter[str]()
        set_aside: list[tuple[int, str]] = []
        for part in self.parts():
            examples += len(part.row)
            set_aside += part.set_aside
            notes.update(part.notes)
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
            "dataset_sha256": _sha256(seen),
            "set_aside": set_aside,
            "notes": dict(notes),
        }
        self._write_manifest()

    def write(self, name: str, content: bytes) -> None:
        """A file of the audit, whole or absent."""
        with _whole_or_absent(self.directory / name):
            write_durably(self.directory / name, content)

    def has(self, name: str) -> bool:
        """Whether there is a file of that name beside the parts."""
        return (self.directory / name).is_file()

    def write_arrays(
        self, name: str, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]
    ) -> None:
        """Arrays in a file beside the parts, and what they are."""
        self.write(name, save_checked(arrays, plain(description)))

    def read_arrays(
        self, name: str, names: Sequence[str] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What `write_arrays` wrote; see `load_checked`."""
        path = self._inside(name)
        with reading(path):
            return load_checked(path, names)

    def remove(self, name: str) -> None:
        """Delete a file beside the parts, if it is there."""
        (self.directory / name).unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        self.write(MANIFEST, document("audit", self.manifest))

    def _inside(self, name: str) -> Path:
        if not is_inside(self.directory, name):
            raise AuditError(
                f"{self.directory / name} of the audit leads out of its directory; it was tampered with, so do not use it."
            )
        return self.directory / name

    def check(self) -> None:
        """Hold the rows of the parts against what the manifest of a finished audit says of them.

        Raises:
            AuditError: they are not those that were counted and hashed at the end of the audit.
        """
        seen = self.all_digests()
        if len(seen) != self.manifest["rows"] or _sha256(seen) != self.manifest["dataset_sha256"]:
            raise damaged(self.directory / MANIFEST, "the parts are not those it was written for")


def _visible(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if not path.name.startswith(".")]


def _name(part: int) -> str:
    return f"{_PARTS}/{part:06d}.safetensors"


def _sha256(digests: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(digests).tobytes()).hexdigest()


def _write_decoder(path: Path, decoder: torch.Tensor) -> None:
    """The rows as they are kept, however many gigabytes, without a copy in memory."""
    with _whole_or_absent(path):
        temporary(path).unlink(missing_ok=True)
        save_file({"decoder": decoder.cpu().contiguous()}, temporary(path))
        with temporary(path).open("rb+") as file:
            os.fsync(file.fileno())
        temporary(path).replace(path)


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
