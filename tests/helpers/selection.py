"""The selection of a step written out in float64, and the record's beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import Trainer

from helpers.worlds import D_SAE, HOOK_POINT, make_sae_dictionary
from trl_sae_audit import FeatureAttributionCallback, RunRecord
from trl_sae_audit.models.language_head import causal_model

EVERY_TOKEN = 10**6
COLUMNS = (
    "selection",
    "selection_standard_error",
    "selection_positive",
    "selection_negative",
    "response_activation",
    "response_frequency",
)


def callback(directory: Path, **options: Any) -> FeatureAttributionCallback:
    options = {"selection_tokens": EVERY_TOKEN, "top_k": D_SAE, **options}
    return FeatureAttributionCallback(make_sae_dictionary(), directory / "record", **options)


def record_of(trainer: Trainer, directory: Path, **options: Any) -> RunRecord:
    trainer.add_callback(callback(directory, **options))
    trainer.train()
    return RunRecord.load(directory / "record")


def stepwise(record: RunRecord, step: int) -> pd.DataFrame:
    steps = record.steps()
    rows = steps[steps["step"] == step].sort_values("feature")
    assert len(rows) == D_SAE
    return rows.rename(
        columns={"selection_chosen": "selection_positive", "selection_rejected": "selection_negative"}
    )


def plant_sinks(model: Any) -> None:
    """Make ten words of the vocabulary attention sinks wherever they stand."""
    with torch.no_grad():
        model.get_input_embeddings().weight[10:20] *= 100


def sinks_of(hidden: Any) -> Tensor:
    """Which of an answer's tokens [n, d_model] are longer than ten times the median, the lower one of an even number: [n]."""
    norms = np.linalg.norm(hidden.detach().double().numpy(), axis=-1)
    if not len(norms):
        return torch.zeros(0, dtype=torch.bool)
    return torch.from_numpy(norms > 10 * np.sort(norms)[(len(norms) - 1) // 2])


class Tokens:
    """What a loss's forwards say of its response tokens: c, the tokens that count, and the hidden states, in double."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights: list[Tensor] = []
        self.counted: list[Tensor] = []
        self.hidden: list[Tensor] = []

    def read(self, loss: Callable[[], Tensor]) -> None:
        """Of one micro-batch, whose loss comes from a forward of a model with TRL's fused head."""
        causal = causal_model(self.model)
        layer = causal.get_submodule(HOOK_POINT)
        seen: dict[str, Tensor] = {}

        def on_layer(module: Any, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                seen["hidden"] = output.detach()

        def on_head(module: Any, args: Any, output: Any) -> None:
            if torch.is_grad_enabled() and output.log_probs is not None:
                seen["log_probs"], seen["mask"] = output.log_probs, output.label_mask

        handles = [layer.register_forward_hook(on_layer), causal.register_forward_hook(on_head)]
        try:
            (gradient,) = torch.autograd.grad(loss(), seen["log_probs"])
        finally:
            for handle in handles:
                handle.remove()
        self.add(-gradient * seen["mask"], seen["mask"], seen["hidden"][:, 1:])

    def add(self, weights: Tensor, counted: Tensor, hidden: Tensor) -> None:
        self.weights.append(weights.double())
        self.counted.append(counted.bool())
        self.hidden.append(hidden)

    def scores(
        self, sides: list[Tensor] | None, *, paired: bool, attention_sinks: bool = False
    ) -> dict[str, np.ndarray]:
        """Σ c·(a − ā) over all tokens, written out; a = 0 at attention sinks."""
        dictionary = make_sae_dictionary()
        encoded = [
            [
                dictionary.encode(h[m].float()).double() * (attention_sinks | ~sinks_of(h[m]))[:, None]
                for h, m in zip(hidden, counted, strict=True)
            ]
            for hidden, counted in zip(self.hidden, self.counted, strict=True)
        ]
        every = torch.cat([rows for batch in encoded for rows in batch])
        origin = every.mean(0) if sides is not None else torch.zeros(D_SAE, dtype=torch.float64)
        rows, examples = [], []
        for batch, weights, counted in zip(encoded, self.weights, self.counted, strict=True):
            contributions = torch.stack(
                [w[m] @ (a - origin) for a, w, m in zip(batch, weights, counted, strict=True)]
            )
            rows.append(contributions)
            half = len(contributions) // 2
            examples.append(contributions[:half] + contributions[half:] if paired else contributions)
        contributions, units = torch.cat(rows), torch.cat(examples)
        side = torch.zeros(len(contributions)) if sides is None else torch.cat(sides)
        scores = {
            "selection": units.sum(0),
            "selection_standard_error": (len(units) * units.var(0, unbiased=True)).sqrt(),
            "selection_positive": contributions[side > 0].sum(0),
            "selection_negative": contributions[side < 0].sum(0),
            "response_activation": every.mean(0),
            "response_frequency": (every != 0).double().mean(0),
        }
        return {name: value.numpy() for name, value in scores.items()}


def compare(record: RunRecord, step: int, expected: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    rows = stepwise(record, step)
    for name in COLUMNS:
        size = np.abs(expected[name]).max()
        error = np.abs(rows[name].to_numpy() - expected[name]).max()
        assert error <= tolerance * size, (step, name, error, size)
    assert np.abs(expected["selection"]).max() > 0
