"""What differs between TRL's trainers: where a micro-batch begins and ends, and which side its rows are on.

Nothing here changes what a trainer computes: methods of the one trainer object are wrapped for the time
of training, and every wrapper calls the original with its own arguments.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..attribution.microbatch import Batch
from ..attribution.responses import Responses
from ..errors import AuditError
from .engines import gradient_divisor
from .kinds import LAYOUTS, overrides, policy_of, trainer_kind
from .lifecycle import LifecycleHooks, TrainerListener
from .method_wraps import Method
from .response_outputs import watch_responses

TOKENS = dict.fromkeys(("GRPOTrainer", "RLOOTrainer"), ("prompt_ids", "completion_ids"))
TOKENS |= dict.fromkeys(("CPOTrainer", "ORPOTrainer"), ("chosen_input_ids", "rejected_input_ids"))
"""Where a trainer's batch has its token ids, if not in `input_ids`."""

PADDED_BY_LOSS = {"CPOTrainer": "pad_token_id", "ORPOTrainer": "padding_value"}
"""Trainers whose loss pads both sides to one length and puts them below each other, and which attribute they pad with."""

SIDES_FROM = {"KTOTrainer": ("label",), "GRPOTrainer": ("advantages",), "RLOOTrainer": ("advantages",)}
"""What else of the batch says which side a row is on."""

LOSS_METHODS = ("compute_loss", "_compute_loss")
STEP_METHODS = ("training_step", "_prepare_inputs")


class TrainerHooks(LifecycleHooks):
    """Wraps a trainer's methods so that `listener` is told of its micro-batches and steps too."""

    def __init__(self, trainer: Trainer, listener: TrainerListener) -> None:
        super().__init__(trainer, listener)
        self.kind = trainer_kind(trainer)
        self.layout = LAYOUTS[self.kind]
        self._handles: list[Any] = []
        self._batches: list[Batch] = []
        self._divisor: float | None = None
        self._has_seen_batch = False
        self._has_own_loss = overrides(trainer, LOSS_METHODS)
        self._has_own_step = self._has_own_loss or overrides(trainer, STEP_METHODS)
        if self.kind == "PPOTrainer":
            self._wrap_ppo()
        else:
            self._wrap_training_step()

    def report_responses(self, report: Callable[[Responses], None]) -> None:
        """From now on, tell before each backward pass what the model's latest forward gives the loss, where it shows."""
        self._handles += watch_responses(self._trainer, self._wraps, report)

    def remove(self) -> None:
        """Put everything back."""
        super().remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._batches = []

    def take_divisor(self) -> float:
        """What the gradients that have arrived since the last call are to be divided by, to be the optimizer's."""
        divisor, self._divisor = self._divisor or 1.0, None
        return divisor

    def _begin_microbatch(self) -> None:
        self._batches = []
        if self._divisor is None:
            self._divisor = gradient_divisor(self._trainer.accelerator)
        self._listener.begin_microbatch()

    def _end_microbatch(self) -> None:
        batches, self._batches = self._batches, []
        self._listener.end_microbatch(batches)
        self._has_seen_batch = True

    # Trainers with the standard training step

    def _wrap_training_step(self) -> None:
        self._wraps.wrap(self._trainer, "training_step", self._training_step)
        if (
            self.kind == "OnlineDPOTrainer"
        ):  # never calls compute_loss, and decides who is chosen after the forward
            self._wraps.wrap(self._trainer, "_calculate_rewards_from_functions", self._reward_completions)
            return
        self._wraps.wrap(self._trainer, "compute_loss", self._compute_loss)
        if hasattr(self._trainer, "_compute_loss"):
            self._wraps.wrap(self._trainer, "_compute_loss", self._compute_inner_loss)

    def _training_step(self, original: Method, /, *args: Any, **kwargs: Any) -> Any:
        self._begin_microbatch()
        loss = original(*args, **kwargs)
        self._end_microbatch()
        return loss

    def _compute_loss(self, original: Method, /, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # an evaluation
            return original(model, inputs, *args, **kwargs)
        known = len(self._batches)
        # a copy: a loss may take keys out, as for label smoothing; a trainer of the user's own may have no keys
        batch = dict(inputs) if isinstance(inputs, Mapping) else {}
        loss = original(model, inputs, *args, **kwargs)
        if len(self._batches) == known:
            self._batches += self._batch_of(batch)
        return loss

    def _compute_inner_loss(
        self, original: Method, /, model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's own loss, which an overriding compute_loss may hand other inputs than it was given."""
        if torch.is_grad_enabled():
            self._batches += self._batch_of(inputs)
        return original(model, inputs, *args, **kwargs)

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
        if "segment_id" in inputs and self.layout.sides is not None:
            raise AuditError(
                f"A row of this {self.kind}'s batch holds several answers (segment_id), so its sides cannot be told apart; give every "
                "answer its own row."
            )
        ids = self._ids_of_batch(inputs, names)
        if any(batch.ids is not None and _equal(batch.ids, ids) for batch in self._batches):
            return []
        if self._has_own_loss and not self._has_seen_batch and self.layout.paired:
            _check_pairs(inputs)
        verify = self._has_own_step or not self._has_seen_batch
        return [Batch(len(ids), ids, self._sides_of_batch(inputs, len(ids)), verify)]

    def _ids_of_batch(self, inputs: Mapping[str, Any], names: tuple[str, ...]) -> Tensor:
        """The token ids [rows, tokens] that the trainer gives the model."""
        if self.kind in PADDED_BY_LOSS:
            padding = getattr(self._trainer, PADDED_BY_LOSS[self.kind])
            device = self._trainer.accelerator.device
            both = self._trainer.concatenated_inputs(dict(inputs), padding_value=padding, device=device)
            return both["concatenated_input_ids"]
        return inputs[names[0]] if len(names) == 1 else torch.cat([inputs[name] for name in names], 1)

    def _sides_of_batch(self, inputs: Mapping[str, Any], rows: int) -> Callable[[], Tensor] | None:
        device = self._trainer.accelerator.device
        if self.layout.paired:
            return functools.partial(_halves, rows, device)
        if self.kind == "TPOTrainer":
            branches = 2 if self._trainer.tpo_alpha == 0 else 3
            return functools.partial(_branches, rows, branches, device)
        if self.kind == "KTOTrainer":
            labels = torch.as_tensor(inputs["label"], device=device)
            return lambda: torch.where(labels.bool(), 1.0, -1.0)
        if self.layout.sides is not None:
            advantages = inputs["advantages"].detach()  # of a trainer of the user's own they may have a graph
            return lambda: advantages.reshape(len(advantages), -1).sum(1).sign()
        return None

    def _reward_completions(self, original: Method, /, *args: Any, **kwargs: Any) -> Any:
        rewards = original(*args, **kwargs)
        self._batches.append(Batch(len(rewards), sides=functools.partial(_better_half, rewards.detach())))
        return rewards

    # PPO, whose train() is one function that tells its callbacks of no step (trl 1.12): its micro-batches are the bodies
    # of accelerator.accumulate, which end with a call of the optimizer

    def _wrap_ppo(self) -> None:
        trainer = self._trainer
        self._wraps.wrap(trainer.accelerator, "accumulate", self._accumulate)
        self._wraps.wrap(trainer.optimizer, "step", self._ppo_step)
        self._handles.append(
            policy_of(trainer).register_forward_hook(self._on_policy_forward, with_kwargs=True)
        )

    @contextlib.contextmanager
    def _accumulate(self, original: Method, /, *models: nn.Module) -> Iterator[None]:
        with self.abort_on_error(), original(*models):
            self._begin_microbatch()
            yield

    def _ppo_step(self, original: Method, /, *args: Any, **kwargs: Any) -> Any:
        self._end_microbatch()
        if self._trainer.accelerator.sync_gradients:
            self._listener.before_optimizer_step()
        return original(*args, **kwargs)

    def _on_policy_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled() or not output.logits.requires_grad:
            return
        # Advantages are local variables of train(). Their sign is the way in which the loss pushes a response's tokens.
        tokens = kwargs["input_ids"]
        pushes: list[Tensor] = []

        def on_gradient(gradient: Tensor) -> None:
            pushes.append(
                -gradient[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1).sum(1, dtype=torch.float32)
            )

        output.logits.register_hook(on_gradient)
        self._batches.append(Batch(len(tokens), sides=lambda: torch.stack(pushes).sum(0).sign()))


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


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
                "Compute_loss is your own, and the first half of its batch does not answer the prompts of the second: chosen "
                "and rejected cannot be told apart. Let the batch be all chosen rows, then the rejected in the same order."
            )


def _halves(rows: int, device: torch.device) -> Tensor:
    sides = torch.ones(rows, dtype=torch.float32, device=device)
    sides[rows // 2 :] = -1
    return sides


def _branches(rows: int, branches: int, device: torch.device) -> Tensor:
    """TPO's rows: all chosen, then all rejected, and then those references that it imitates and compares with nothing."""
    sides = torch.zeros(rows, dtype=torch.float32, device=device)
    sides[: rows // branches] = 1
    sides[rows // branches : 2 * (rows // branches)] = -1
    return sides


def _better_half(rewards: Tensor) -> Tensor:
    """OnlineDPO's choice between two completions: the first where its reward is at least the second's."""
    first, second = rewards.chunk(2)
    first_is_chosen = torch.where(first >= second, 1.0, -1.0)
    return torch.cat([first_is_chosen, -first_is_chosen])
