"""What a callback must not leave behind, and a callback that fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback

WRAPPED = {
    "log",
    "training_step",
    "compute_loss",
    "_evaluate",
    "_run_epoch",
    "_finalize_training",
    "_save_checkpoint",
    "_calculate_rewards_from_functions",
    "_forward",
}


class FailingOnce(TrainerCallback):
    """Raises at an event of the second optimizer step."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._fail)

    def _fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 1:
            raise RuntimeError("planted")


def failing_at(number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which raises when it is called for the `number`-th time."""
    calls = itertools.count(1)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise RuntimeError("planted")
        return call(*args, **kwargs)

    return failing


def nothing_left(trainer: Trainer) -> bool:
    """No hook of this package on the model (transformers leaves some of its own), no wrapped method."""
    hooks = [hook for module in trainer.model.modules() for hook in module._forward_hooks.values()]
    ours = [hook for hook in hooks if hook.__module__.startswith("trl_sae_audit")]
    handler = trainer.callback_handler
    events = {"on_train_begin", "on_epoch_begin", "on_train_end"}
    wrapped = [
        type(vars(one).get(event)).__name__ for one in (handler, *handler.callbacks) for event in events
    ]
    return not ours and not WRAPPED & vars(trainer).keys() and "_Wrapper" not in wrapped
