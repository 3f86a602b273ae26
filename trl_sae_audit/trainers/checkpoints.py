"""Where a trainer's checkpoints are: the one it resumes from, and the one it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .call_stack import trainer_frames


def checkpoint_directory(trainer: Trainer, trial: Any) -> Path:
    """Where the trainer saves its present step; a trial of a hyperparameter search has a directory of its own."""
    return Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"


def has_checkpoint(output_dir: Path) -> bool:
    """Whether a run can be resumed from a checkpoint in `output_dir`.

    A process that dies while it saves one leaves a directory that the trainer cannot read: its state comes last.
    """
    return any(_is_whole(path / TRAINER_STATE_NAME) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def resumed_checkpoint(trainer: Trainer) -> Path:
    """Where the running `train` resumes from: it may be given a checkpoint of any place and name, and tells no callback."""
    for owner, frame in trainer_frames():
        checkpoint = frame.f_locals.get("resume_from_checkpoint")
        if owner is trainer and isinstance(checkpoint, (str, Path)):
            return Path(checkpoint)
    return checkpoint_directory(trainer, None)


def _is_whole(state: Path) -> bool:
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
