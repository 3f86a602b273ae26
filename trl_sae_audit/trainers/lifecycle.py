"""A trainer's logs, checkpoints and end, which callbacks are told of too late or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import Trainer

from ..attribution.microbatch import Batch
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

    def before_checkpoint(self) -> None:
        """The trainer is about to save a checkpoint, in whatever way it was asked to."""

    def after_checkpoint(self) -> None:
        """The trainer has saved a checkpoint."""

    def before_train_end(self) -> None:
        """Training ended without an error, and the trainer's callbacks, including reporters, are about to be told."""

    def after_train_end(self) -> None:
        """The trainer's callbacks have been told of the end, or one of them has raised."""

    def abort(self) -> None:
        """Training ended with an exception: take everything off the model and the trainer."""


class LifecycleHooks:
    """Wraps a trainer's methods so that `listener` is told of its logs, checkpoints and end."""

    def __init__(self, trainer: Trainer, listener: TrainerListener) -> None:
        self._listener = listener
        self._wraps = MethodWraps()
        # `log`: what a callback adds in on_log reaches neither the history nor the reporters, which come before it.
        self._wraps.wrap(trainer, "log", self._log)
        # `_save_checkpoint`: callbacks are not told of the checkpoint that a SIGTERM asks for.
        self._wraps.wrap(trainer, "_save_checkpoint", self._save_checkpoint)
        # The handler's `on_train_end`: reporters close in their own, before a user's callback is told of the end.
        self._wraps.wrap(trainer.callback_handler, "on_train_end", self._end_training)
        self._wraps.wrap(trainer, "_run_epoch", self._run_epoch)

    def remove(self) -> None:
        """Put everything back."""
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

    def _save_checkpoint(self, original: Method, /, *args: Any, **kwargs: Any) -> Any:
        self._listener.before_checkpoint()
        saved = original(*args, **kwargs)
        self._listener.after_checkpoint()
        return saved

    def _end_training(self, original: Method, /, *args: Any, **kwargs: Any) -> Any:
        self._listener.before_train_end()
        try:
            return original(*args, **kwargs)
        finally:  # another callback may raise before ours is told of the end
            self._listener.after_train_end()

    def _run_epoch(self, original: Method, /, *args: Any, **kwargs: Any) -> Any:
        with self.abort_on_error():
            return original(*args, **kwargs)
