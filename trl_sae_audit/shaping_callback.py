"""Coefficients that survive a restart: the state of a penalty in the trainer's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import AuditError
from .method_wraps import MethodWraps
from .record_files import write_durably
from .shaping import Shaper
from .trainers import calling_trainer
from .untrusted import read_json


class Shaped(Protocol):
    """A ShapedReward or a ShapedRewardModel."""

    shaper: Shaper


class ShapingCallback(TrainerCallback):
    """Saves the coefficients of shaped rewards with every checkpoint, and restores them when a run resumes.

    A checkpoint made in the midst of a step, as on SIGTERM (`enable_jit_checkpoint`), gets those from the step's beginning: a
    resumed run takes that step anew, rewards included.

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
        self._wraps = MethodWraps()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            self._restore(args, state)
        self._note(state)
        self._wraps.undo()
        if args.enable_jit_checkpoint:  # of which callbacks are not told
            trainer = calling_trainer(self)
            self._wraps.wrap(trainer, "_save_checkpoint", lambda original: self._saving(trainer, original))
            self._wraps.wrap(trainer, "_run_epoch", self._undone_after_an_error)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._save(calling_trainer(self))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._wraps.undo()

    def _note(self, state: TrainerState) -> None:
        """Keep the coefficients as they are after step `state.global_step`; on every process at once."""
        for penalty in self.penalties:
            penalty.begin_batch()  # so that none has anything pending
        self._states = [penalty.state_dict() for penalty in self.penalties]
        self._states_at = state.global_step

    def _save(self, trainer: Trainer) -> None:
        if self._states_at != trainer.state.global_step:
            self._note(
                trainer.state
            )  # the step has ended, but a callback before this one is the first to hear of it
        if trainer.accelerator.is_main_process:
            path = _path(trainer.args, trainer.state)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(self._states).encode())

    def _saving(self, trainer: Trainer, original: Callable[..., Any]) -> Callable[..., Any]:
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            saved = original(*args, **kwargs)
            self._save(trainer)
            return saved

        return save_checkpoint

    def _undone_after_an_error(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run_epoch(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except BaseException:
                self._wraps.undo()
                raise

        return run_epoch

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        path = _path(args, state)
        try:
            saved = read_json(path)
            if not isinstance(saved, list):
                raise ValueError("it is no list")
        except (OSError, ValueError) as error:
            raise AuditError(
                f"The run resumes at step {state.global_step}, but {path} has no coefficients of the penalty to continue "
                f"with ({type(error).__name__}: {error}); resume without ShapingCallback to begin them anew."
            ) from error
        if len(saved) != len(self.penalties):
            raise AuditError(
                f"{path} has the coefficients of {len(saved)} shaped reward(s), and this run has {len(self.penalties)}; "
                "pass the same ones in the same order."
            )
        for penalty, one in zip(self.penalties, saved, strict=True):
            penalty.load_state_dict(one)


def _path(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "sae_shaping.json"
