"""What a trainer's checkpoint holds for the callback, so that a resumed run continues bit for bit.

The trainer writes its part of a checkpoint first, and a process may die before ours is there as well. So the record is
written before both, with a note of which checkpoint is about to be made: a checkpoint without our part is completed
from a record that ends where it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from ..attribution.totals import FeatureTotals
from ..errors import AuditError
from ..io.atomic import sync_directory, write_durably
from ..io.manifest import MANIFEST, StoredFile, read_manifest, reading, stored_files, write_manifest
from ..saes.dictionary import FeatureDictionary
from .files import encode, parse_totals
from .reader import RunRecord


@dataclasses.dataclass(frozen=True)
class _Content:
    step: NonNegativeInt
    dictionaries: list[str]
    baselines: dict[str, list[float]]
    record: str
    files: list[StoredFile]

    def __post_init__(self) -> None:
        if len(self.files) != len(self.dictionaries):
            raise ValueError(f"it has {len(self.files)} totals of {len(self.dictionaries)} dictionaries")


@dataclasses.dataclass(frozen=True)
class CallbackState:
    """Where a run stands.

    Attributes:
        step: optimizer steps so far.
        totals: dictionary name → running totals.
        baselines: dictionary name → activation of the watched features on the probe before training.
        record: name of the record's directory, which is numbered if an earlier run had the requested name.
    """

    step: int
    totals: Mapping[str, FeatureTotals]
    baselines: Mapping[str, Tensor]
    record: str

    def save(self, directory: Path, dictionaries: Sequence[FeatureDictionary]) -> None:
        """Write into a checkpoint; the manifest last, so that its presence says the rest is there."""
        directory.mkdir(parents=True, exist_ok=True)
        stored = []
        for index, dictionary in enumerate(dictionaries):
            ending, content, features = encode(self.totals[dictionary.name])
            stored.append(StoredFile.of(f"totals-{index}.{ending}", content, features))
            write_durably(directory / stored[-1].file, content)
        body = {
            "step": self.step,
            "dictionaries": [dictionary.identity for dictionary in dictionaries],
            "baselines": self._baselines(),
            "record": self.record,
        }
        write_manifest(directory, "callback_state", body, stored)
        sync_directory(directory)

    def note(self, global_step: int) -> dict[str, Any]:
        """What a record keeps, besides the totals, for a checkpoint that is about to be made at `global_step`."""
        return {"checkpoint": {"global_step": global_step, "step": self.step, "baselines": self._baselines()}}

    def _baselines(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in self.baselines.items()}

    @classmethod
    def of_record(
        cls, output_dir: Path, global_step: int, dictionaries: Sequence[FeatureDictionary]
    ) -> CallbackState | None:
        """The state at the checkpoint of `global_step`, from a record in `output_dir` that ends right there."""
        if not (output_dir / MANIFEST).exists():
            return None
        record = RunRecord.load(output_dir)
        note = record.manifest["extra"].get("checkpoint", {})
        if (note.get("global_step"), note.get("step")) != (global_step, record.last_step):
            return None
        if [entry["identity"] for entry in record.dictionaries] != [one.identity for one in dictionaries]:
            return None
        with reading(output_dir / MANIFEST):
            baselines = _read_baselines(note["baselines"])
        totals = {dictionary.name: record.totals(dictionary.name) for dictionary in dictionaries}
        return cls(step=record.last_step, totals=totals, baselines=baselines, record=output_dir.name)

    @classmethod
    def load(cls, directory: Path, dictionaries: Sequence[FeatureDictionary]) -> CallbackState:
        """What `save` wrote.

        Raises:
            AuditError: damaged, or of a run with other dictionaries.
        """
        state = read_manifest(directory, "callback_state", shape=_Content)
        if state["dictionaries"] != [dictionary.identity for dictionary in dictionaries]:
            raise AuditError(
                f"The checkpoint {directory.parent} was made with other dictionaries than this run has; pass the same "
                "ones in the same order, or start a new run."
            )
        totals = {
            dictionary.name: parse_totals(directory / stored.file, stored, stored.read(directory))
            for dictionary, stored in zip(dictionaries, stored_files(state), strict=True)
        }
        with reading(directory / MANIFEST):
            baselines = _read_baselines(state["baselines"])
        return cls(step=state["step"], totals=totals, baselines=baselines, record=state["record"])


def _read_baselines(stored: Mapping[str, list[float]]) -> dict[str, Tensor]:
    """Raises:
    ValueError: a number that float32 does not hold.
    """
    baselines = {name: torch.tensor(values, dtype=torch.float32) for name, values in stored.items()}
    for name, values in baselines.items():
        if not values.isfinite().all():
            raise ValueError(f"the probe's first activations of {name!r} are too large")
    return baselines
