"""What differs between TRL's trainers: where a micro-batch begins and ends, and which side its rows are on.

Nothing here changes what a trainer computes: methods of the one trainer object are wrapped for the time
of training, and every wrapper calls the original with its own arguments.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
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
}


class Listener(Protocol):
    """What a trainer's training reports while it runs."""

    def begin_microbatch(self) -> None: ...

    def end_microbatch(self, sides: Tensor | None) -> None:
        """`sides`: +1, -1 or 0 of each row, None where the trainer has no sides."""

    def before_optimizer_step(self) -> None: ...

    def enrich_log(self, logs: dict[str, Any]) -> None:
        """Add to a record the trainer is about to log."""

    def before_checkpoint(self) -> None:
        """The trainer is about to save a checkpoint, in whatever way it was asked to."""

    def after_checkpoint(self) -> None:
        """The trainer has saved a checkpoint."""

    def before_train_end(self) -> None:
        """Training ended well, and the trainer's callbacks, reporters among them, are about to hear of it."""

    def abort(self) -> None:
        """Training ended with an exception: take everything off the model and the trainer."""


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
    """Name of the TRL trainer that `trainer` is, or that the user's own class derives from.

    Raises:
        AuditError: if its step is not known.
    """
    for cls in type(trainer).__mro__:
        if cls.__module__.split(".")[0] == "trl":
            if cls.__name__ in LAYOUTS:
                return cls.__name__
            break
    raise AuditError(
        f"{type(trainer).__name__} is not a trainer whose step is known here, and its attribution could be silently "
        f"wrong; trainers that can be read: {', '.join(sorted(LAYOUTS))} and your own classes derived from them."
    )


def policy_of(trainer: Trainer) -> nn.Module:
    """The model whose loss is attributed; in PPO the policy without the value model."""
    if trainer_kind(trainer) == "PPOTrainer":
        return trainer.accelerator.unwrap_model(trainer.model).policy
    return trainer.model


class _Wrapper:
    """Stands in an object for one of its methods; hands through to it once it is no longer active."""

    def __init__(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        self.in_instance = name in vars(owner)
        self.active = True
        self._replacement = make(self.original)
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._replacement if self.active else self.original)(*args, **kwargs)


class MethodWraps:
    """Replaces methods of single objects, and puts them back.

    Several may wrap the same method and end in any order: one that ends below another hands through until
    that one ends as well.
    """

    def __init__(self) -> None:
        self._wrappers: list[_Wrapper] = []

    def wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        wrapper = _Wrapper(owner, name, make)
        setattr(owner, name, wrapper)
        self._wrappers.append(wrapper)

    def undo(self) -> None:
        while self._wrappers:
            ended = self._wrappers.pop()
            ended.active = False
            top = vars(ended.owner).get(ended.name)
            while isinstance(top, _Wrapper) and not top.active:
                if top.in_instance:
                    setattr(top.owner, top.name, top.original)
                else:
                    delattr(top.owner, top.name)
                top = vars(ended.owner).get(ended.name)


class Seams:
    """Wraps a trainer's methods so that `listener` hears of its micro-batches, steps and logs."""

    def __init__(self, trainer: Trainer, listener: Listener) -> None:
        self.kind = trainer_kind(trainer)
        self.layout = LAYOUTS[self.kind]
        self._trainer = trainer
        self._listener = listener
        self._wraps = MethodWraps()
        self._handles: list[Any] = []
        self._sides: Callable[[], Tensor] | None = None
        self._wraps.wrap(trainer, "log", self._logging)
        self._wraps.wrap(trainer, "_save_checkpoint", self._saving)
        self._wraps.wrap(trainer.callback_handler, "on_train_end", self._ending)
        if self.kind == "PPOTrainer":
            self._wrap_ppo()
        else:
            self._wrap_training_step()

    def remove(self) -> None:
        """Put everything back."""
        self._wraps.undo()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sides = None

    def _logging(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def log(logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._listener.enrich_log(logs)
            return original(logs, *args, **kwargs)

        return log

    def _saving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            self._listener.before_checkpoint()
            saved = original(*args, **kwargs)
            self._listener.after_checkpoint()
            return saved

        return save_checkpoint

    def _ending(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def on_train_end(*args: Any, **kwargs: Any) -> Any:
            self._listener.before_train_end()
            return original(*args, **kwargs)

        return on_train_end

    def _guarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self._abort_on_error():
                return original(*args, **kwargs)

        return guarded

    @contextlib.contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._listener.abort()
            raise

    # Trainers with the standard training step

    def _wrap_training_step(self) -> None:
        self._wraps.wrap(self._trainer, "_run_epoch", self._guarded)
        self._wraps.wrap(self._trainer, "training_step", self._training_step)
        if self.kind == "OnlineDPOTrainer":
            self._wraps.wrap(self._trainer, "_calculate_rewards_from_functions", self._online_rewards)
        else:
            self._wraps.wrap(self._trainer, "compute_loss", self._compute_loss)

    def _training_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with self._microbatch():
                return original(*args, **kwargs)

        return training_step

    @contextlib.contextmanager
    def _microbatch(self) -> Iterator[None]:
        self._listener.begin_microbatch()
        yield
        sides, self._sides = self._sides, None
        self._listener.end_microbatch(None if sides is None else sides())

    def _compute_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self._sides = self._sides_of_batch(inputs)
            return original(model, inputs, *args, **kwargs)

        return compute_loss

    def _sides_of_batch(self, inputs: dict[str, Any]) -> Callable[[], Tensor] | None:
        device = self._trainer.accelerator.device
        if self.kind in ("DPOTrainer", "RewardTrainer"):
            return functools.partial(_halves, inputs["input_ids"].shape[0], device)
        if self.kind == "KTOTrainer":
            labels = torch.as_tensor(inputs["label"], device=device)
            return lambda: torch.where(labels.bool(), 1.0, -1.0)
        if self.kind in ("GRPOTrainer", "RLOOTrainer"):
            advantages = inputs["advantages"]
            return lambda: advantages.reshape(len(advantages), -1).sum(1).sign()
        return None

    def _online_rewards(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def rewards_of_completions(*args: Any, **kwargs: Any) -> Any:
            rewards = original(*args, **kwargs)
            self._sides = functools.partial(_better_half, rewards)
            return rewards

        return rewards_of_completions

    # PPO, whose train() is one function: its micro-batches are the bodies of accelerator.accumulate

    def _wrap_ppo(self) -> None:
        trainer = self._trainer
        self._wraps.wrap(trainer.accelerator, "accumulate", self._accumulate)
        self._wraps.wrap(trainer.optimizer, "step", self._ppo_step)
        self._handles.append(
            policy_of(trainer).register_forward_hook(self._on_policy_forward, with_kwargs=True)
        )

    def _accumulate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def accumulate(*models: nn.Module) -> Iterator[None]:
            with self._abort_on_error(), original(*models):
                self._listener.begin_microbatch()
                yield

        return accumulate

    def _ppo_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            sides, self._sides = self._sides, None
            self._listener.end_microbatch(None if sides is None else sides())
            if self._trainer.accelerator.sync_gradients:
                self._listener.before_optimizer_step()
            return original(*args, **kwargs)

        return step

    def _on_policy_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled() or not output.logits.requires_grad:
            return
        tokens = kwargs["input_ids"]

        def on_gradient(gradient: Tensor) -> None:
            push = -gradient[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1).sum(1, dtype=torch.float32)
            self._sides = push.sign

        output.logits.register_hook(on_gradient)


def _halves(rows: int, device: torch.device) -> Tensor:
    sides = torch.ones(rows, device=device)
    sides[rows // 2 :] = -1
    return sides


def _better_half(rewards: Tensor) -> Tensor:
    """OnlineDPO's choice between two completions: the first where its reward is at least the second's."""
    first, second = rewards.chunk(2)
    first_is_chosen = torch.where(first >= second, 1.0, -1.0)
    return torch.cat([first_is_chosen, -first_is_chosen])
