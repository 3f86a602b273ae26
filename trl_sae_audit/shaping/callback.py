"""Coefficients that survive a restart: the state of a penalty in the trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import AuditError
from ..io.atomic import write_durably
from ..io.manifest import document, fit, read_document
from ..trainers.checkpoints import resumed_checkpoint
from ..trainers.kinds import calling_trainer, check_added_once
from ..trainers.lifecycle import LifecycleHooks, TrainerListener
from .shaper import Shaper

_FILE = "sae_shaping.json"


class Shaped(Protocol):
    """A ShapedReward or a ShapedRewardModel."""

    shaper: Shaper


class ShapingCallback(TrainerCallback, TrainerListener):
    """Saves the coefficients of shaped rewards with every checkpoint, and restores them when a run resumes.

    A checkpoint made during a step, as on SIGTERM (`enable_jit_checkpoint`), gets those from the step's beginning: a
    resumed run takes that step again, rewards included.

    Args:
        shaped: the ShapedReward or ShapedRewardModel of the run, or several, in the same order at every start.

    Raises:
        AuditError: from `trainer.train(resume_from_checkpoint=…)`, if the checkpoint has no such state, a damaged one,
            or that of other flags or another kind of penalty.
    """

    def __init__(self, *shaped: Shaped) -> None:
        if not shaped:
            raise AuditError("ShapingCallback has nothing to save; pass the shaped reward.")
        self.penalties = [each.shaper.penalty for each in shaped]
        self._states: list[dict[str, Any]] = []
        self._states_at = -1
        self._hooks: LifecycleHooks | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer = calling_trainer(self)
        check_added_once(self, self._trainer)
        if state.global_step > 0:
            self._restore(resumed_checkpoint(self._trainer) / _FILE, state)
        self._keep_states(state)
        self.abort()
        self._hooks = LifecycleHooks(self._trainer, self)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep_states(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.abort()

    def after_checkpoint(self, directory: Path) -> None:
        trainer = self._trainer
        if self._states_at != trainer.state.global_step:
            # The step has ended, but callbacks before this one are told first.
            self._keep_states(trainer.state)
        if trainer.accelerator.is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
            write_durably(directory / _FILE, document("penalties", {"states": self._states}))

    def abort(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def _keep_states(self, state: TrainerState) -> None:
        """Keep the coefficients as they are after step `state.global_step`; on every process at once."""
        for penalty in self.penalties:
            penalty.begin_batch()  # so that none has anything pending
        self._states = [penalty.state_dict() for penalty in self.penalties]
        self._states_at = state.global_step

    def _restore(self, path: Path, state: TrainerState) -> None:
        try:
            saved = fit(list[dict[str, Any]], read_document(path, "penalties").get("states"))
        except ValueError as error:
            raise AuditError(
                f"The run resumes at step {state.global_step}, but {path} has no coefficients of the penalty to continue "
                f"with ({error}); resume without ShapingCallback to begin them again."
            ) from error
        if len(saved) != len(self.penalties):
            raise AuditError(
                f"{path} has the coefficients of {len(saved)} shaped reward(s), and this run has {len(self.penalties)}; "
                "pass the same ones in the same order."
            )
        for penalty, one in zip(self.penalties, saved, strict=True):
            penalty.load_state_dict(one)
