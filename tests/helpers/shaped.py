"""Flags, scorers and reward models to shape."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from helpers.worlds import (
    make_dictionary,
    make_model,
    make_reward_model,
    make_tokenizer,
)
from trl_sae_audit import (
    FeatureScorer,
    Flag,
    FlagSet,
)

FLAGS = FlagSet([Flag("tiny", 3, "flattery"), Flag("tiny", 50, "length", weight=2.0, direction="down")])


SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)


WEIGHTS = torch.tensor([1.0, 2.0], dtype=torch.float64)


CALIBRATION = [(f"w{i} w{i + 1} ", f"w{i + 2} w{(7 * i) % 50} w{i + 3}") for i in range(20)]


def scorer(model: nn.Module | None = None, **options: Any) -> FeatureScorer:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=5) if model is None else model
    return FeatureScorer(model, tokenizer, make_dictionary(), **options).calibrate(CALIBRATION)


def reward_model(seed: int = 1) -> Any:
    """With rewards that differ as much as the penalties do."""
    model = make_reward_model(make_tokenizer(), seed)
    with torch.no_grad():
        model.score.weight.mul_(20)
    return model


def weighted(scores: Tensor) -> Tensor:
    return (scores.double() * SIGNS) @ WEIGHTS


def adapted(seed: int = 0) -> Any:
    """The reward model with a LoRA that changes its rewards."""
    torch.manual_seed(seed)
    adapter = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    return get_peft_model(reward_model(), adapter)
