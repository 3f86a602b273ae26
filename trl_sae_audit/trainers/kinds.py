"""The trainers that can be read: the calling trainer, its kind, and the model it trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import AuditError
from .call_stack import trainer_frames


@dataclass(frozen=True)
class Layout:
    """How the rows of a micro-batch form examples and sides.

    `sides` names the positive and the negative side, None where a loss has none. In a `paired` layout row j
    and row j + rows/2 are one example. `on_policy` where the responses are what the model itself generates.
    """

    sides: tuple[str, str] | None
    paired: bool = False
    on_policy: bool = False


LAYOUTS = {
    "DPOTrainer": Layout(("chosen", "rejected"), paired=True),
    "RewardTrainer": Layout(("chosen", "rejected"), paired=True),
    "CPOTrainer": Layout(("chosen", "rejected"), paired=True),
    "ORPOTrainer": Layout(("chosen", "rejected"), paired=True),
    "OnlineDPOTrainer": Layout(("chosen", "rejected"), paired=True, on_policy=True),
    "TPOTrainer": Layout(("chosen", "rejected")),
    "KTOTrainer": Layout(("desirable", "undesirable")),
    "GRPOTrainer": Layout(("reinforced", "suppressed"), on_policy=True),
    "RLOOTrainer": Layout(("reinforced", "suppressed"), on_policy=True),
    "PPOTrainer": Layout(("reinforced", "suppressed"), on_policy=True),
    "SFTTrainer": Layout(None),
    "Trainer": Layout(None),
}


_REFUSED = {
    "AsyncGRPOTrainer": "packs several answers into one row and reads the tokens that they share once, so that a token's gradient "
    "belongs to several answers, of either side; train with GRPOTrainer, or leave the callback out",
}
"""Trainers whose rows and sides cannot be told, and why."""


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The trainer from whose method `callback` is being called.

    Raises:
        AuditError: if the callback is called from elsewhere.
    """
    for trainer, _ in trainer_frames():
        if callback in trainer.callback_handler.callbacks:
            return trainer
    raise AuditError(
        f"{type(callback).__name__} is called from outside a Trainer; pass it to a TRL trainer in callbacks=[…] or by "
        "add_callback, and call trainer.train()."
    )


def check_added_once(callback: TrainerCallback, trainer: Trainer) -> None:
    """Raises:
    AuditError: if the trainer has the callback twice, and would tell it of every step twice.
    """
    if sum(each is callback for each in trainer.callback_handler.callbacks) > 1:
        raise AuditError(
            f"This {type(callback).__name__} was added to the trainer twice, and would count every step twice; pass it in "
            "callbacks=[…] or to add_callback, not both."
        )


def trainer_kind(trainer: Trainer) -> str:
    """Name of the TRL trainer in LAYOUTS that `trainer` is or derives from; "Trainer" where only the loop is known.

    Raises:
        AuditError: if it does not train in transformers' loop, whose micro-batches and steps are known; or packs rows of which no
            one can tell whose they are.
    """
    for cls in type(trainer).__mro__:
        if cls.__name__ in _REFUSED:
            raise AuditError(f"{type(trainer).__name__} {_REFUSED[cls.__name__]}.")
        if cls.__module__.split(".")[0] == "trl":
            if cls.__name__ in LAYOUTS:
                return cls.__name__
            if "training_step" in vars(cls):
                break
        elif cls.__name__ != (name := _without_prefix(cls.__name__)) and name in _rewritten_kinds(trainer):
            return name
    if type(trainer)._inner_training_loop is Trainer._inner_training_loop:
        return "Trainer"
    raise AuditError(
        f"{type(trainer).__name__} has its own training loop, whose steps are not known here, and its attribution could "
        "be silently wrong; trainers that can be read: "
        f"{', '.join(sorted(LAYOUTS))}, and classes that keep transformers' training loop."
    )


def _without_prefix(name: str) -> str:
    """`UnslothDPOTrainer` and `_UnslothDPOTrainer` are TRL's class rewritten, and not derived from it."""
    return name.lstrip("_").removeprefix("Unsloth")


def _rewritten_kinds(trainer: Trainer) -> tuple[str, ...]:
    """TRL's trainers that a rewritten class may be, by its configuration."""
    configs = {_without_prefix(cls.__name__) for cls in type(trainer.args).__mro__}
    return tuple(
        kind for kind in LAYOUTS if kind.replace("Trainer", "Config") in configs and kind != "PPOTrainer"
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
