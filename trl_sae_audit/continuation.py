"""Where a run is taken up: its record's directory, and the callback's part of the trainer's checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from .checkpoint import CallbackState
from .dictionary import FeatureDictionary
from .errors import AuditError
from .record_manifest import MANIFEST, is_same_run, read_manifest
from .record_writer import RecordWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """What joins a run to the one it resumes.

    Attributes:
        trainer: whose `train` is running.
        output_dir: of the record.
        dictionaries: of the run.
        position: which of the trainer's attribution callbacks this is; names its part of a checkpoint.
    """

    trainer: Trainer
    output_dir: Path
    dictionaries: Sequence[FeatureDictionary]
    position: int

    def load(self) -> CallbackState | None:
        """What the checkpoint being resumed from says; None in a new run, or where the callback is new to it."""
        global_step = self.trainer.state.global_step
        if global_step == 0:
            return None
        if self.is_saved:
            return CallbackState.load(self._directory, self.dictionaries)
        state = CallbackState.of_record(self.output_dir, global_step, self.dictionaries)
        if state is not None:
            return state
        if self.output_dir.exists():
            raise AuditError(
                f"The run resumes at step {global_step}, but {self._directory.parent} holds no state "
                f"of this callback to continue the record in {self.output_dir} with; choose a new output_dir, which "
                "then begins at this step."
            )
        logger.warning(
            "The run resumes at step %d without a state of this callback: its record begins there.",
            global_step,
        )
        return None

    @property
    def is_saved(self) -> bool:
        """Whether the checkpoint of the trainer's step has a state of this callback."""
        return CallbackState.is_in(self._directory)

    def save(self, state: CallbackState) -> None:
        """Put it into the checkpoint of the trainer's step; where that fails, the log says so."""
        try:
            state.save(self._directory, self.dictionaries)
        except OSError as error:
            logger.error(
                "%s has no state of this callback, for it cannot be written (%s). A run can be resumed from it as long as "
                "the record in %s ends there.",
                *(self._directory.parent, error.strerror, self.output_dir),
            )

    def discard(self) -> None:
        """The checkpoint of the trainer's step is about to be made anew: forget the state in it, if any."""
        CallbackState.discard(self._directory)

    def open_record(self, header: Mapping[str, Any], state: CallbackState | None) -> RecordWriter:
        """The record of the run that is resumed from `state`, or a new one."""
        if state is not None and (self.output_dir / MANIFEST).exists():
            return RecordWriter.resume(self.output_dir, header, state.step, state.totals)
        anew = self._left_no_checkpoint(header)
        if anew:
            logger.warning(
                "%s holds the record of this very run, which was killed before its first checkpoint: it begins anew.",
                self.output_dir,
            )
        return RecordWriter.create(self.output_dir, header, anew=anew)

    def _left_no_checkpoint(self, header: Mapping[str, Any]) -> bool:
        """Whether the same run was killed here, and can only be started from its beginning."""
        if self.trainer.state.global_step or not (self.output_dir / MANIFEST).exists():
            return False
        if any(Path(self.trainer.args.output_dir).glob("checkpoint-*")):
            return False
        manifest = read_manifest(self.output_dir)
        return manifest.status == "running" and is_same_run(manifest, header)

    @property
    def _directory(self) -> Path:
        checkpoint = Path(self.trainer.args.output_dir) / f"checkpoint-{self.trainer.state.global_step}"
        return checkpoint / f"sae_audit_{self.position}"
