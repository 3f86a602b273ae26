"""Coefficients that survive a restart: the state of a penalty in the trainer's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import AuditError
from .record_files import write_durably
from .shaping import Shaper
from .trainers import calling_trainer
from .untrusted import read_json


class Shaped(Protocol):
    """A ShapedReward or a ShapedRewardModel."""

    shaper: Shaper


class ShapingCallback(TrainerCallback):
    """Saves the coefficients of shaped rewards with every checkpoint, and restores them when a run resumes.

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            return
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

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for penalty in self.penalties:
            penalty.begin_batch()  # on every process, so that none has anything pending
        if calling_trainer(self).accelerator.is_main_process:
            path = _path(args, state)
            path.parent.mkdir(parents=True, exist_ok=True)
            states = [penalty.state_dict() for penalty in self.penalties]
            write_durably(path, json.dumps(states).encode())


def _path(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "sae_shaping.json"
