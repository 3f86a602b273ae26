"""Who calls: trainers pass callbacks and rewards everything but themselves, and are further down the call stack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from transformers import Trainer


def calling_frames() -> Iterator[FrameType]:
    """The running functions, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def trainer_frames() -> Iterator[tuple[Trainer, FrameType]]:
    """Those of them that are a trainer's methods, and the trainer."""
    for frame in calling_frames():
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            yield owner, frame
