"""A trainer's logs, checkpoints and end, which callbacks are told of too late or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback

from ..attribution.microbatch import Batch
from .call_stack import calling_frames
from .checkpoints import checkpoint_directory
from .method_wraps import Method, MethodWraps


class TrainerListener:
    """Receives the events of a training; subclasses override what they need."""

    def begin_microbatch(self) -> None:
        """A forward and a backward pass are about to begin."""

    def end_microbatch(self, batches: list[Batch]) -> None:
        """They have ended.

        Args:
            batches: what the trainer computed its loss on; usually one, none if it computed none.
        """

    def before_optimizer_step(self) -> None:
        """The step's gradient is complete. Told by PPO's hooks only: other trainers tell their callbacks."""

    def enrich_log(self, logs: dict[str, Any]) -> None:
        """Add to what the trainer is about to log."""

    def before_checkpoint(self, directory: Path) -> None:
        """The trainer is about to save a checkpoint in `directory`, in whatever way it was asked to."""

    def after_checkpoint(self, directory: Path) -> None:
        """The trainer has saved a checkpoint."""

    def before_train_end(self) -> None:
        """Training ended without an error, and the trainer's callbacks, including reporters, are about to be told."""

    def after_train_end(self) -> None:
        """The trainer's callbacks have been told of the end, or one of them has raised: take everything off, as `abort` does."""
        self.abort()

    def abort(self) -> None:
        """Training ended with an exception: take everything off the model and the trainer."""


class LifecycleHooks:
    """Wraps a trainer's methods so that `listener` is told of its logs, checkpoints and end."""

    def __init__(self, trainer: Trainer, listener: TrainerListener) -> None:
        self._trainer = trainer
        self._listener = listener
        self._wraps = MethodWraps()
        # `log`: what a callback adds in on_log reaches neither the history nor the reporters, which come before it.
        self._wraps.wrap(trainer, "log", self._log)
        # `_save_checkpoint`: callbacks are not told of the checkpoint that a SIGTERM asks for.
        self._wraps.wrap(trainer, "_save_checkpoint", self._save_checkpoint)
        # The handler's `on_train_end`: reporters close in their own, before a user's callback is told of the end.
        self._wraps.wrap(trainer.callback_handler, "on_train_end", self._end_training)
        # What runs between the callbacks' beginning and their end, and may raise.
        for owner, name in (
            (trainer, "_evaluate"),
            (trainer, "_run_epoch"),
            (trainer, "_finalize_training"),
            (trainer.callback_handler, "on_epoch_begin"),
        ):
            self._wraps.wrap(owner, name, self._pass_through)
        # The handler is telling its callbacks of the beginning just now, these after the one that listens.
        self._later = MethodWraps()
        for callback in _later_callbacks(trainer):
            self._later.wrap(callback, "on_train_begin", self._pass_through)

    def remove(self) -> None:
        """Put everything back."""
        self._later.undo()
        self._wraps.undo()

    @contextlib.contextmanager
    def abort_on_error(self) -> Iterator[None]:
        """No callback is told of an exception that ends training, and the hooks would stay on the model."""
        try:
            yield
        except BaseException:
            self._listener.abort()
            raise

    def _log(self, original: Method, /, logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._listener.enrich_log(logs)
        return original(logs, *args, **kwargs)

    def _save_checkpoint(self, original: Method, /, model: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
        directory = checkpoint_directory(self._trainer, trial)
        self._listener.before_checkpoint(directory)
        saved = original(model, trial, *args, **kwargs)
        self._listener.after_checkpoint(directory)
        return saved

    def _end_training(self, original: Method, /, *args: Any, **kwargs: Any) -> Any:
        with self.abort_on_error():
            self._listener.before_train_end()
        try:
            return original(*args, **kwargs)
        finally:  # another callback may raise before ours is told of the end
            self._listener.after_train_end()

    def _pass_through(self, original: Method, /, *args: Any, **kwargs: Any) -> Any:
        with self.abort_on_error():
            return original(*args, **kwargs)


def _later_callbacks(trainer: Trainer) -> list[TrainerCallback]:
    """Those that have not been told of the beginning yet, while the trainer's handler tells one after the other."""
    callbacks = trainer.callback_handler.callbacks
    told = next((frame.f_locals["callback"] for frame in calling_frames() if _tells_callbacks(frame)), None)
    place = next((number for number, each in enumerate(callbacks) if each is told), len(callbacks))
    return [callback for callback in callbacks[place + 1 :] if hasattr(callback, "__dict__")]


def _tells_callbacks(frame: FrameType) -> bool:
    return frame.f_code.co_name == "call_event" and "callback" in frame.f_locals
