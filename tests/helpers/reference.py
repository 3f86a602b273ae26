"""An independent float64 reference: the gradient with respect to a zero vector added to each row's hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from trl_sae_audit import FeatureDictionary

Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


class StepRecorder(TrainerCallback):
    """Keeps a copy of every micro-batch a trainer computes a loss on, cut into optimizer steps."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[dict[str, Any], dict[str, Any]]]] = []
        self._current: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def watch(self, trainer: Trainer) -> None:
        original = trainer.compute_loss

        def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self._current.append((copy.deepcopy(dict(inputs)), dict(kwargs)))
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.add_callback(self)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self._current)
        self._current = []


def record_online_dpo(trainer: Any) -> tuple[list[tuple[Any, ...]], list[Tensor], Any]:
    """Record what an OnlineDPO trainer computes its loss on.

    Returns:
        The arguments of every forward under autograd but the model, the rewards of every batch, and the trainer's own forward.
    """
    forwards: list[tuple[Any, ...]] = []
    rewards: list[Tensor] = []
    original_forward, original_rewards = trainer._forward, trainer._calculate_rewards_from_functions

    def forward(model: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            forwards.append(args)
        return original_forward(model, *args)

    def calculate(*args: Any, **kwargs: Any) -> Any:
        rewards.append(original_rewards(*args, **kwargs))
        return rewards[-1]

    trainer._forward, trainer._calculate_rewards_from_functions = forward, calculate
    return forwards, rewards, original_forward


@dataclass
class Reference:
    """One optimizer step: G of every row, in the order the model saw them, and the rows' sides."""

    rows: list[Tensor] = field(default_factory=list)
    sides: list[Tensor] = field(default_factory=list)
    examples: list[Tensor] = field(default_factory=list)

    def scores(self, dictionary: FeatureDictionary) -> dict[str, np.ndarray]:
        rows, examples = torch.cat(self.rows), torch.cat(self.examples)
        sides = torch.cat(self.sides) if self.sides else torch.zeros(len(rows))
        directions = dictionary.directions.double()
        contributions = -examples @ directions.T
        n = len(contributions)
        total = contributions.sum(0)
        norm = rows.sum(0).norm()
        return {
            "attribution": total.numpy(),
            "positive": (-rows[sides > 0].sum(0) @ directions.T).numpy(),
            "negative": (-rows[sides < 0].sum(0) @ directions.T).numpy(),
            "cosine": (total / norm).numpy(),
            "share": (total / norm).square().numpy(),
            "standard_error": (contributions.var(0, unbiased=True) * n).sqrt().numpy(),
        }


def divided_by_accelerate(trainer: Trainer) -> int:
    """By what accelerate divides every loss, after the trainer has divided it by the number of micro-batches.

    1 in later versions; transformers 5.3 tells accelerate of the accumulation, so that a gradient is divided by its steps twice.
    """
    return trainer.accelerator.gradient_accumulation_steps


def row_gradients(model: nn.Module, hook_point: str, rows: int, loss: Callable[[], Tensor]) -> Tensor:
    """∂ loss / ∂ (a zero vector added to the hook point's output, one per row): [rows, d_model], float64."""
    layer = next(module for name, module in model.named_modules() if name.endswith(hook_point))
    parameter = next(model.parameters())
    d_model = model.config.get_text_config().hidden_size
    zeros = torch.zeros(rows, 1, d_model, dtype=parameter.dtype, requires_grad=True)
    handle = layer.register_forward_hook(
        lambda module, args, output: output + zeros if torch.is_grad_enabled() else None
    )
    try:
        (gradient,) = torch.autograd.grad(loss(), zeros)
    finally:
        handle.remove()
    return gradient[:, 0].double()


def to_double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def sequence_logps(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """log π(completion | prompt) of every row, written out."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logps = F.log_softmax(logits[:, :-1], dim=-1)
    tokens = inputs["input_ids"][:, 1:]
    picked = logps.gather(-1, tokens[..., None]).squeeze(-1)
    return (picked * inputs["completion_mask"][:, 1:]).sum(1)


def dpo_loss(model: nn.Module, reference_logps: Tensor, inputs: dict[str, Any], beta: float) -> Tensor:
    """Mean over pairs of −log σ(β((log π⁺ − log π_ref⁺) − (log π⁻ − log π_ref⁻)))."""
    chosen, rejected = (sequence_logps(model, inputs) - reference_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def relative_error(measured: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected value."""
    return float(np.abs(measured - expected).max() / np.abs(expected).max())


def recorded(steps: Any, step: int, column: str) -> np.ndarray:
    """A column of `RunRecord.steps()` for one step, by feature; the step must have every feature.

    `positive` and `negative` also where the trainer's sides are chosen and rejected.
    """
    rows = steps[steps["step"] == step].sort_values("feature")
    if column not in rows:
        column = {"positive": "chosen", "negative": "rejected"}[column]
    return rows[column].to_numpy()
