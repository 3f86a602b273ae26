"""Where a run is taken up: its record's directory, and the callback's part of the trainer's checkpoints."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..errors import AuditError, DirectoryTakenError
from ..io.manifest import MANIFEST
from ..record.checkpoint import CallbackState
from ..record.manifest import is_same_run, read_manifest
from ..record.writer import RecordWriter
from ..saes.dictionary import FeatureDictionary
from ..trainers.checkpoints import has_checkpoint, resumed_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeState:
    """What joins a run to the one it resumes.

    Attributes:
        trainer: whose `train` is running.
        output_dir: as requested; a new run gets a numbered one next to it if that holds an earlier run's record.
        dictionaries: of the run.
        position: which of the trainer's attribution callbacks this is; names its part of a checkpoint.
        overwrite: replace an earlier run's record instead.
    """

    trainer: Trainer
    output_dir: Path
    dictionaries: Sequence[FeatureDictionary]
    position: int
    overwrite: bool

    def load(self) -> CallbackState | None:
        """What the checkpoint being resumed from says; None in a new run, or where the callback is new to it."""
        global_step = self.trainer.state.global_step
        if global_step == 0:
            return None
        if self.is_saved:
            return CallbackState.load(self._resumed, self.dictionaries)
        for directory in self._numbered():
            state = CallbackState.of_record(directory, global_step, self.dictionaries)
            if state is not None:
                return state
            if not directory.exists():
                break
        if self.output_dir.exists():
            raise AuditError(
                f"The run resumes at step {global_step}, but {self._resumed.parent} holds no state "
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
        """Whether the checkpoint that is resumed from has a state of this callback."""
        return (self._resumed / MANIFEST).is_file()

    def save(self, state: CallbackState, checkpoint: Path | None = None) -> None:
        """Put it into a checkpoint, by default the one that is resumed from; where that fails, the log says so."""
        directory = self._resumed if checkpoint is None else checkpoint / self._name
        try:
            state.save(directory, self.dictionaries)
        except OSError as error:
            logger.error(
                "%s has no state of this callback, for it cannot be written (%s). A run can be resumed from it as long as "
                "the record in %s ends there.",
                *(directory.parent, error.strerror, self.output_dir),
            )

    def discard(self, checkpoint: Path) -> None:
        """A checkpoint is about to be made, perhaps again: forget the state in it, if any."""
        (checkpoint / self._name / MANIFEST).unlink(missing_ok=True)

    def open_record(self, header: Mapping[str, Any], state: CallbackState | None) -> RecordWriter:
        """The record of the run that is resumed from `state`, or a new one."""
        if state is not None:
            directory = self._record_of(state)
            if (directory / MANIFEST).exists():
                return RecordWriter.resume(directory, header, state.step, state.totals)
        if self.overwrite:
            return RecordWriter.create(self.output_dir, header, overwrite=True)
        if self._left_no_checkpoint(header):
            with suppress(DirectoryTakenError):  # the same run is still running
                writer = RecordWriter.create(self.output_dir, header, overwrite=True)
                logger.warning(
                    "%s holds the record of this very run, which was killed before its first checkpoint: the record starts again.",
                    self.output_dir,
                )
                return writer
        return self._create_beside(header)

    def _create_beside(self, header: Mapping[str, Any]) -> RecordWriter:
        """A new record in the requested directory, or in the first numbered one without a run."""
        for directory in self._numbered():
            try:
                writer = RecordWriter.create(directory, header)
            except DirectoryTakenError:
                continue
            if directory != self.output_dir:
                logger.warning(
                    "%s has the record of another run, so this run's record is in %s; overwrite=True replaces the other one.",
                    *(self.output_dir, directory),
                )
            return writer
        raise AssertionError("The numbers never end.")

    def _numbered(self) -> Iterator[Path]:
        """The requested directory, then those for a second run, a third, and so on."""
        yield self.output_dir
        for number in itertools.count(2):
            yield self.output_dir.with_name(f"{self.output_dir.name}-{number}")

    def _record_of(self, state: CallbackState) -> Path:
        """Where the resumed run's record is: numbered if it was, unless a new output_dir is requested."""
        numbered = re.fullmatch(rf"{re.escape(self.output_dir.name)}-\d+", state.record)
        return self.output_dir.with_name(state.record) if numbered else self.output_dir

    def _left_no_checkpoint(self, header: Mapping[str, Any]) -> bool:
        """Whether the same run was killed here, and can only be started from its beginning."""
        if self.trainer.state.global_step or not (self.output_dir / MANIFEST).exists():
            return False
        if has_checkpoint(Path(self.trainer.args.output_dir)):
            return False
        manifest = read_manifest(self.output_dir)
        return manifest["status"] == "running" and is_same_run(manifest, header)

    @property
    def _name(self) -> str:
        """Of this callback's part of a checkpoint."""
        return f"sae_audit_{self.position}"

    @property
    def _resumed(self) -> Path:
        return resumed_checkpoint(self.trainer) / self._name
