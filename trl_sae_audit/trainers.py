"""Which trainers can be read, and who is who: the trainer that calls, its kind, the model it trains."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

from torch import nn
from transformers import Trainer, TrainerCallback

from .errors import AuditError


@dataclass(frozen=True)
class Layout:
    """How the rows of a micro-batch form examples and sides.

    `sides` names the positive and the negative side, None where a loss has none. In a `paired` layout row j
    and row j + rows/2 are one example.
    """

    sides: tuple[str, str] | None
    paired: bool = False


LAYOUTS = {
    "DPOTrainer": Layout(("chosen", "rejected"), paired=True),
    "RewardTrainer": Layout(("chosen", "rejected"), paired=True),
    "OnlineDPOTrainer": Layout(("chosen", "rejected"), paired=True),
    "KTOTrainer": Layout(("desirable", "undesirable")),
    "GRPOTrainer": Layout(("reinforced", "suppressed")),
    "RLOOTrainer": Layout(("reinforced", "suppressed")),
    "PPOTrainer": Layout(("reinforced", "suppressed")),
    "SFTTrainer": Layout(None),
    "Trainer": Layout(None),
}


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The trainer from whose method `callback` is being called.

    Trainers pass their callbacks everything but themselves; they are however further down the call stack.

    Raises:
        AuditError: if the callback is called from elsewhere.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    raise AuditError(
        f"{type(callback).__name__} is called from outside a Trainer; pass it to a TRL trainer in callbacks=[…] or by "
        "add_callback, and call trainer.train()."
    )


def trainer_kind(trainer: Trainer) -> str:
    """Name of the TRL trainer in LAYOUTS that `trainer` is or derives from; "Trainer" where only the loop is known.

    Raises:
        AuditError: if it does not train in transformers' loop, whose micro-batches and steps are known.
    """
    for cls in type(trainer).__mro__:
        if cls.__module__.split(".")[0] == "trl":
            if cls.__name__ in LAYOUTS:
                return cls.__name__
            if "training_step" in vars(cls):
                break
    if type(trainer)._inner_training_loop is Trainer._inner_training_loop:
        return "Trainer"
    raise AuditError(
        f"{type(trainer).__name__} has a training loop of its own, whose steps are not known here, and its attribution could "
        "be silently wrong; trainers that can be read: "
        f"{', '.join(sorted(LAYOUTS))}, and classes that keep transformers' training loop."
    )


def policy_of(trainer: Trainer) -> nn.Module:
    """The model whose loss is attributed; in PPO the policy without the value model."""
    if trainer_kind(trainer) == "PPOTrainer":
        return trainer.accelerator.unwrap_model(trainer.model).policy
    return trainer.model


def overrides(trainer: Trainer, names: tuple[str, ...]) -> bool:
    """Whether any of these methods, or the collator, is neither TRL's nor transformers' own."""
    parts = [getattr(trainer, name) for name in names if hasattr(trainer, name)]
    if "_prepare_inputs" in names:
        parts.append(trainer.data_collator)
    return any(part.__module__.split(".")[0] not in ("trl", "transformers") for part in parts)
