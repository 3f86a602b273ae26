"""What differs between TRL's trainers: where a micro-batch begins and ends, and which side its rows are on.

Nothing here changes what a trainer computes: methods of the one trainer object are wrapped for the time
of training, and every wrapper calls the original with its own arguments.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer

from .errors import AuditError
from .method_wraps import MethodWraps
from .microbatch import Batch
from .trainers import LAYOUTS, overrides, policy_of, trainer_kind

TOKENS = dict.fromkeys(("GRPOTrainer", "RLOOTrainer"), ("prompt_ids", "completion_ids"))
"""Where a trainer's batch has its token ids, if not in `input_ids`."""

SIDES_FROM = {"KTOTrainer": ("label",), "GRPOTrainer": ("advantages",), "RLOOTrainer": ("advantages",)}
"""What else of the batch says which side a row is on."""

LOSS_METHODS = ("compute_loss", "_compute_loss")
STEP_METHODS = ("training_step", "_prepare_inputs")


class Listener(Protocol):
    """What a trainer's training reports while it runs."""

    def begin_microbatch(self) -> None: ...

    def end_microbatch(self, batches: list[Batch]) -> None:
        """`batches`: what the trainer computed its loss on; usually one, none if it computed none."""

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


class Seams:
    """Wraps a trainer's methods so that `listener` hears of its micro-batches, steps and logs."""

    def __init__(self, trainer: Trainer, listener: Listener) -> None:
        self.kind = trainer_kind(trainer)
        self.layout = LAYOUTS[self.kind]
        self._trainer = trainer
        self._listener = listener
        self._wraps = MethodWraps()
        self._handles: list[Any] = []
        self._batches: list[Batch] = []
        self._seen_one = False
        self._own_loss = overrides(trainer, LOSS_METHODS)
        self._own_step = self._own_loss or overrides(trainer, STEP_METHODS)
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
        self._batches = []

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
            return
        self._wraps.wrap(self._trainer, "compute_loss", self._compute_loss)
        if hasattr(self._trainer, "_compute_loss"):
            self._wraps.wrap(self._trainer, "_compute_loss", self._inner_loss)

    def _training_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with self._microbatch():
                return original(*args, **kwargs)

        return training_step

    @contextlib.contextmanager
    def _microbatch(self) -> Iterator[None]:
        self._batches = []
        self._listener.begin_microbatch()
        yield
        self._end_microbatch()

    def _end_microbatch(self) -> None:
        batches, self._batches = self._batches, []
        self._listener.end_microbatch(batches)
        self._seen_one = True

    def _compute_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(model, inputs, *args, **kwargs)
            before, given = len(self._batches), dict(inputs)
            loss = original(model, inputs, *args, **kwargs)
            if len(self._batches) == before:
                self._batches += self._batch_of(given)
            return loss

        return compute_loss

    def _inner_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """TRL's own loss, which an overriding compute_loss may hand other inputs than it was given."""

        def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self._batches += self._batch_of(inputs)
            return original(model, inputs, *args, **kwargs)

        return compute_loss

    def _batch_of(self, inputs: Mapping[str, Any]) -> list[Batch]:
        """What a loss is computed on; nothing where it was already, or where it need not be known."""
        names = TOKENS.get(self.kind, ("input_ids",))
        missing = [name for name in (*names, *SIDES_FROM.get(self.kind, ())) if name not in inputs]
        if missing and self.layout.sides is None:
            return []
        if missing:
            raise AuditError(
                f"The batch of this {self.kind} has no {', '.join(map(repr, missing))}, from which rows and sides are told: a "
                "custom collator or an overridden method changes its layout. Keep TRL's names, or leave the callback out."
            )
        ids = inputs[names[0]] if len(names) == 1 else torch.cat([inputs[name] for name in names], 1)
        if any(batch.ids is not None and _equal(batch.ids, ids) for batch in self._batches):
            return []
        if self._own_loss and not self._seen_one and self.layout.paired:
            _check_pairs(inputs)
        verify = self._own_step or not self._seen_one
        return [Batch(len(ids), ids, self._sides_of_batch(inputs), verify)]

    def _sides_of_batch(self, inputs: Mapping[str, Any]) -> Callable[[], Tensor] | None:
        device = self._trainer.accelerator.device
        if self.layout.paired:
            return functools.partial(_halves, inputs["input_ids"].shape[0], device)
        if self.kind == "KTOTrainer":
            labels = torch.as_tensor(inputs["label"], device=device)
            return lambda: torch.where(labels.bool(), 1.0, -1.0)
        if self.layout.sides is not None:
            advantages = inputs["advantages"]
            return lambda: advantages.reshape(len(advantages), -1).sum(1).sign()
        return None

    def _online_rewards(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def rewards_of_completions(*args: Any, **kwargs: Any) -> Any:
            rewards = original(*args, **kwargs)
            self._batches.append(Batch(len(rewards), sides=functools.partial(_better_half, rewards)))
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
                self._batches = []
                self._listener.begin_microbatch()
                yield

        return accumulate

    def _ppo_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self._end_microbatch()
            if self._trainer.accelerator.sync_gradients:
                self._listener.before_optimizer_step()
            return original(*args, **kwargs)

        return step

    def _on_policy_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled() or not output.logits.requires_grad:
            return
        tokens = kwargs["input_ids"]
        pushes: list[Tensor] = []

        def on_gradient(gradient: Tensor) -> None:
            pushes.append(
                -gradient[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1).sum(1, dtype=torch.float32)
            )

        output.logits.register_hook(on_gradient)
        self._batches.append(Batch(len(tokens), sides=lambda: torch.stack(pushes).sum(0).sign()))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _check_pairs(inputs: Mapping[str, Any]) -> None:
    """Raises:
    AuditError: if the halves of the batch do not answer the same prompts, where prompts can be told.
    """
    if "completion_mask" not in inputs:
        return
    ids, answer = inputs["input_ids"], inputs["completion_mask"].bool()
    prompts = [row[: int(mask.int().argmax())].tolist() for row, mask in zip(ids, answer, strict=True)]
    half = len(prompts) // 2
    for chosen, rejected in zip(prompts[:half], prompts[half:], strict=True):
        shared = min(len(chosen), len(rejected))
        if chosen[len(chosen) - shared :] != rejected[len(rejected) - shared :]:
            raise AuditError(
                "compute_loss is your own, and the first half of its batch does not answer the prompts of the second: chosen "
                "and rejected cannot be told apart. Let the batch be all chosen rows, then the rejected in the same order."
            )


def _halves(rows: int, device: torch.device) -> Tensor:
    sides = torch.ones(rows, device=device)
    sides[rows // 2 :] = -1
    return sides


def _better_half(rewards: Tensor) -> Tensor:
    """OnlineDPO's choice between two completions: the first where its reward is at least the second's."""
    first, second = rewards.chunk(2)
    first_is_chosen = torch.where(first >= second, 1.0, -1.0)
    return torch.cat([first_is_chosen, -first_is_chosen])
