"""What a trainer's checkpoint holds for the callback, so that a resumed run goes on to the bit.

The trainer writes its part of a checkpoint first, and a process may die before ours is there as well. So the record is
written before both, with a note of which checkpoint is about to be made: a checkpoint without our part is completed
from a record that ends where it does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dictionary import FeatureDictionary
from .errors import AuditError
from .record import RunRecord
from .record_files import load_totals, save_totals, write_durably
from .record_manifest import MANIFEST
from .totals import FeatureTotals
from .untrusted import read_json

_STATE = "state.json"


@dataclasses.dataclass(frozen=True)
class CallbackState:
    """Where a run stands.

    Attributes:
        step: optimizer steps so far.
        totals: dictionary name → running totals.
        baselines: dictionary name → activation of the watched features on the probe before training.
    """

    step: int
    totals: Mapping[str, FeatureTotals]
    baselines: Mapping[str, Tensor]

    def save(self, directory: Path, dictionaries: Sequence[FeatureDictionary]) -> None:
        """Write into a checkpoint; `state.json` last, so that its presence says the rest is there."""
        directory.mkdir(parents=True, exist_ok=True)
        for index, dictionary in enumerate(dictionaries):
            save_totals(directory / f"totals-{index}.safetensors", self.totals[dictionary.name])
        state = {
            "step": self.step,
            "dictionaries": [dictionary.identity for dictionary in dictionaries],
            "baselines": {name: values.tolist() for name, values in self.baselines.items()},
        }
        write_durably(directory / _STATE, json.dumps(state).encode())

    def note(self, global_step: int) -> dict[str, Any]:
        """What a record keeps, besides the totals, for a checkpoint that is about to be made at `global_step`."""
        baselines = {name: values.tolist() for name, values in self.baselines.items()}
        return {"checkpoint": {"global_step": global_step, "step": self.step, "baselines": baselines}}

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether `directory` holds a state."""
        return (directory / _STATE).is_file()

    @staticmethod
    def discard(directory: Path) -> None:
        """Forget the state in `directory`, if any, because the checkpoint it belongs to is about to be replaced."""
        (directory / _STATE).unlink(missing_ok=True)

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
        return cls(
            step=record.last_step,
            totals={dictionary.name: record.totals(dictionary.name) for dictionary in dictionaries},
            baselines={name: torch.tensor(values) for name, values in note["baselines"].items()},
        )

    @classmethod
    def load(cls, directory: Path, dictionaries: Sequence[FeatureDictionary]) -> CallbackState:
        """What `save` wrote.

        Raises:
            AuditError: damaged, or of a run with other dictionaries.
        """
        try:
            state = read_json(directory / _STATE)
            identities, step, baselines = (state[key] for key in ("dictionaries", "step", "baselines"))
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ValueError(f"its step is {step!r}")
            watched = {name: torch.tensor(values, dtype=torch.float32) for name, values in baselines.items()}
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            OverflowError,
        ) as error:
            raise AuditError(
                f"{directory / _STATE} is damaged ({error}); resume from an earlier checkpoint."
            ) from error
        if identities != [dictionary.identity for dictionary in dictionaries]:
            raise AuditError(
                f"The checkpoint {directory.parent} was made with other dictionaries than this run has; pass the same "
                "ones in the same order, or start a new run."
            )
        return cls(
            step=step,
            totals={
                dictionary.name: load_totals(directory / f"totals-{index}.safetensors")
                for index, dictionary in enumerate(dictionaries)
            },
            baselines=watched,
        )
