"""Where a trainer's checkpoints are: the one it resumes from, and the one it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .call_stack import trainer_frames


def checkpoint_directory(trainer: Trainer, trial: Any) -> Path:
    """Where the trainer saves its present step; a trial of a hyperparameter search has a directory of its own."""
    return Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"


def resumed_checkpoint(trainer: Trainer) -> Path:
    """Where the running `train` resumes from: it may be given a checkpoint of any place and name, and tells no callback."""
    for owner, frame in trainer_frames():
        checkpoint = frame.f_locals.get("resume_from_checkpoint")
        if owner is trainer and isinstance(checkpoint, (str, Path)):
            return Path(checkpoint)
    return checkpoint_directory(trainer, None)
