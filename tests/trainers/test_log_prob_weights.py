"""c of TRL's own losses: by least squares at the last hidden state, by autograd at the log-probabilities, by finite differences.

The loss of a trainer is computed once more with a shift added to the log-probabilities that its model returns.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trainers import build
from torch import Tensor

from trl_sae_audit.attribution.selection import (
    RESIDUAL_TOLERANCE,
    LogProbWeights,
    least_squares_weights,
)
from trl_sae_audit.models.language_head import LanguageHead, causal_model

pytestmark = pytest.mark.newest

DPO_LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "sapo", "cispo", "vespo"]
CLIPPED = {"num_iterations": 2, "epsilon": 0.05}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"DPO {loss}": ("DPO", {"loss_type": loss}) for loss in DPO_LOSSES},
    "DPO two losses": ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}),
    "DPO forward KL": ("DPO", {"f_divergence_type": "forward_kl"}),
    "DPO JS": ("DPO", {"f_divergence_type": "js_divergence"}),
    "DPO, tails at half": ("DPO", {"ld_alpha": 0.5}),
    "KTO kto": ("KTO", {"loss_type": "kto", "beta": 0.5}),
    "KTO apo": ("KTO", {"loss_type": "apo_zero_unpaired", "beta": 0.5}),
    **{f"GRPO {loss}": ("GRPO", {"loss_type": loss, **CLIPPED}) for loss in GRPO_LOSSES},
    "GRPO luspo": ("GRPO", {"loss_type": "luspo", "importance_sampling_level": "sequence", **CLIPPED}),
    "GRPO with reference": ("GRPO", {"temperature": 0.7, **CLIPPED}),
    "GRPO on policy": ("GRPO", {}),
    "RLOO": ("RLOO", {"num_iterations": 2, "epsilon": 0.2, "temperature": 1.3}),
    "SFT": ("SFT", {}),
    "SFT dft": ("SFT", {"loss_type": "dft"}),
}
DETACHED = ("GRPO cispo", "GRPO vespo", "GRPO on policy", "SFT dft")
"""Losses that hold a function of the log-probabilities fixed, which a finite difference cannot."""
CLIPPING = [f"GRPO {loss}" for loss in ("grpo", "bnpo", "dr_grpo", "dapo")]


class Losses:
    """A trainer whose loss on its second batch can be computed with its log-probabilities shifted."""

    def __init__(self, directory: Path, kind: str, options: dict[str, Any]) -> None:
        if options.get("loss_type") in ("exo_pair", "robust"):
            options = {**options, "label_smoothing": 0.1}
        settings = {"gradient_checkpointing": False, "gradient_accumulation_steps": 1, "max_steps": 2}
        self.trainer: Any = build(
            kind, directory, torch.float64, **settings, learning_rate=1e-2, logging_steps=9, **options
        )
        self.causal = causal_model(self.trainer.model)
        self.decoder = self.causal.get_decoder()
        self.last: Tensor
        self.ids: Tensor
        self.log_probs: Tensor
        self.mask: Tensor

    def on_second_batch(self, check: Callable[[Callable[[Tensor | None], Tensor]], None]) -> None:
        """Train, and call `check` with the function shift → loss."""
        original, calls = self.trainer.compute_loss, []

        def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                check(
                    lambda shift: self._shifted(shift, lambda: original(model, dict(inputs), *args, **kwargs))
                )
            return original(model, inputs, *args, **kwargs)

        self.trainer.compute_loss = compute_loss
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer.train()
        assert len(calls) == 2

    def _shifted(self, shift: Tensor | None, loss: Callable[[], Tensor]) -> Tensor:
        def on_head(module: Any, args: Any, output: Any) -> None:
            if torch.is_grad_enabled() and output.log_probs is not None:
                self.mask = output.label_mask
                self.log_probs = output.log_probs.double()
                if shift is not None:
                    self.log_probs = self.log_probs + shift
                output.log_probs = self.log_probs

        def on_decoder(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                self.last, self.ids = output.last_hidden_state, kwargs["input_ids"]

        handles = [
            self.causal.register_forward_hook(on_head),
            self.decoder.register_forward_hook(on_decoder, with_kwargs=True),
        ]
        try:
            return loss()
        finally:
            for handle in handles:
                handle.remove()

    def least_squares(self, loss: Tensor) -> tuple[LogProbWeights, Tensor]:
        """By the gradient at the last hidden state, and the gradient at the log-probabilities, of the response tokens."""
        at_last, at_log_probs = torch.autograd.grad(loss, [self.last, self.log_probs])
        mask = self.mask
        temperature = getattr(self.trainer, "temperature", 1.0)
        head = LanguageHead(self.causal, self.decoder, temperature)
        _, slopes = head.slopes(self.last[:, :-1][mask], self.ids[:, 1:][mask])
        return least_squares_weights(at_last[:, :-1][mask], slopes, mask.nonzero()[:, 0]), at_log_probs


@pytest.mark.parametrize("name", CASES)
def test_three_ways_to_the_weights_agree(name: str, tmp_path: Path) -> None:
    kind, options = CASES[name]
    losses = Losses(tmp_path, kind, options)
    if name == "GRPO with reference":
        losses.trainer.beta, losses.trainer.ref_model = 0.2, copy.deepcopy(losses.trainer.model)

    def check(loss: Callable[[Tensor | None], Tensor]) -> None:
        found, gradient = losses.least_squares(loss(None))
        mask, expected = losses.mask.clone(), -gradient
        size = expected.abs().max()
        assert size > 0
        assert (found.values - expected[mask]).abs().max() <= 1e-5 * size
        assert found.residual <= 1e-8
        if name in CLIPPING:
            assert (expected[mask] == 0).any(), "no token was clipped"
        if name in DETACHED:
            return
        for row in mask.any(1).nonzero().flatten().tolist():
            step = torch.zeros_like(expected)
            step[row, mask[row]] = 1e-5 / mask[row].sum()
            slope = (loss(step) - loss(-step)) / 2e-5
            mean = expected[row, mask[row]].mean()
            assert abs(-slope - mean) <= 1e-5 * size, row

    losses.on_second_batch(check)


@pytest.mark.parametrize("options", [{"entropy_coef": 3.0}])
def test_an_entropy_bonus_leaves_a_residual(options: dict[str, Any], tmp_path: Path) -> None:
    losses = Losses(tmp_path, "GRPO", options)

    def check(loss: Callable[[Tensor | None], Tensor]) -> None:
        found, _ = losses.least_squares(loss(None))
        assert found.residual > RESIDUAL_TOLERANCE

    losses.on_second_batch(check)
