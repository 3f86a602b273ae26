"""What a trainer's checkpoint holds for the callback, so that a resumed run goes on to the bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .dictionary import FeatureDictionary
from .errors import AuditError
from .record_files import load_totals, save_totals
from .totals import FeatureTotals

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
        (directory / _STATE).write_text(json.dumps(state))

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether `directory` holds a state."""
        return (directory / _STATE).is_file()

    @classmethod
    def load(cls, directory: Path, dictionaries: Sequence[FeatureDictionary]) -> CallbackState:
        """What `save` wrote.

        Raises:
            AuditError: damaged, or of a run with other dictionaries.
        """
        try:
            state = json.loads((directory / _STATE).read_text())
            identities, step, baselines = (state[key] for key in ("dictionaries", "step", "baselines"))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
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
            baselines={name: torch.tensor(values) for name, values in baselines.items()},
        )
