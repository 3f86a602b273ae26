"""Every trainer of the newest TRL on tiny real parts, built the same way at every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from worlds import (
    labelled,
    make_model,
    make_reward_model,
    make_tokenizer,
    pairs,
    prompts,
    reward_by_length,
    texts,
)

Build = Callable[..., Trainer]


@dataclass(frozen=True)
class Kind:
    """A trainer, and what it is given.

    Attributes:
        trainer, config: its classes.
        data: makes n rows.
        defaults: of its configuration.
        model: makes the one that is trained of a tokenizer.
        second: what the trainer calls another model, its reference or teacher; None if it takes none.
        rewarded: whether its answers are.
    """

    trainer: type[Trainer]
    config: type
    data: Callable[[int], Any]
    defaults: dict[str, Any]
    model: Callable[..., nn.Module] = make_model
    second: str | None = None
    rewarded: bool = False

    def beside(
        self, make: Callable[..., nn.Module], tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
    ) -> dict[str, Any]:
        """What the trainer is given beside a model that `make` makes, its configuration and data."""
        given: dict[str, Any] = {}
        if self.second is not None:
            given[self.second] = make(tokenizer, seed=5).to(dtype)
        if self.rewarded:
            given["reward_funcs"] = reward_by_length
        return given


CUT = {"max_length": 64}
SAMPLED = {"num_generations": 4, "max_completion_length": 6, "beta": 0.0}
KINDS = {
    "DPO": Kind(DPOTrainer, DPOConfig, pairs, CUT, second="ref_model"),
    "KTO": Kind(KTOTrainer, KTOConfig, labelled, CUT, second="ref_model"),
    "Reward": Kind(RewardTrainer, RewardConfig, pairs, CUT, make_reward_model),
    "SFT": Kind(SFTTrainer, SFTConfig, texts, CUT),
    "GRPO": Kind(GRPOTrainer, GRPOConfig, prompts, SAMPLED, rewarded=True),
    "RLOO": Kind(RLOOTrainer, RLOOConfig, prompts, SAMPLED, rewarded=True),
    "OnlineDPO": Kind(
        OnlineDPOTrainer,
        OnlineDPOConfig,
        prompts,
        {"max_new_tokens": 6, "beta": 0.5},
        second="ref_model",
        rewarded=True,
    ),
}


def arguments(directory: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 7,
        **overrides,
    }


def build(kind: str, directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    """The trainer, its parts in `dtype`."""
    known = KINDS[kind]
    tokenizer = make_tokenizer()
    return known.trainer(
        known.model(tokenizer).to(dtype),
        args=known.config(**arguments(directory, **known.defaults | overrides)),
        train_dataset=known.data(24),
        processing_class=tokenizer,
        **known.beside(known.model, tokenizer, dtype),
    )


dpo, sft, grpo = (partial(build, kind) for kind in ("DPO", "SFT", "GRPO"))
BUILDERS: dict[str, Build] = {kind: partial(build, kind) for kind in KINDS} | {
    "KTO": partial(build, "KTO", beta=0.5)
}
