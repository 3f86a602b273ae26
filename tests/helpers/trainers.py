"""Every trainer of the newest TRL on tiny real parts, built the same way at every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
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
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from helpers.worlds import (
    labelled,
    make_model,
    make_reward_model,
    make_tokenizer,
    pairs,
    prompts,
    reward_by_length,
    texts,
    triples,
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

    def build(
        self,
        directory: Path,
        dtype: torch.dtype = torch.float32,
        settings: dict[str, Any] | None = None,
        **parts: Any,
    ) -> Trainer:
        """The trainer, its parts in `dtype`.

        Args:
            directory: for what it writes.
            dtype: of its models.
            settings: for its configuration, besides the defaults.
            parts: further arguments of the trainer, or others in place of the usual ones; one that is None is left out.
        """
        tokenizer = make_tokenizer()
        usual: dict[str, Any] = {"train_dataset": self.data(24), "processing_class": tokenizer}
        if self.second is not None:
            usual[self.second] = self.model(tokenizer, seed=5).to(dtype)
        if self.rewarded:
            usual["reward_funcs"] = reward_by_length
        model = parts.pop("model", None) or self.model(tokenizer).to(dtype)
        args = self.config(**arguments(directory, **self.defaults | (settings or {})))
        return self.trainer(
            model, args=args, **{name: part for name, part in (usual | parts).items() if part is not None}
        )


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

LESS_COMMON = {
    "CPO": Kind(CPOTrainer, CPOConfig, pairs, CUT),
    "ORPO": Kind(ORPOTrainer, ORPOConfig, pairs, CUT),
    "TPO": Kind(TPOTrainer, TPOConfig, triples, CUT),
    "TPO without its reference": Kind(TPOTrainer, TPOConfig, triples, CUT | {"tpo_alpha": 0.0}),
    "GMPO": Kind(GMPOTrainer, GMPOConfig, prompts, SAMPLED, rewarded=True),
}
"""Of `trl.experimental`, for which the tests of the loss suffice."""


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
    """The trainer of the newest TRL, its parts in `dtype`."""
    return (KINDS | LESS_COMMON)[kind].build(directory, dtype, overrides)


dpo, sft, grpo = (partial(build, kind) for kind in ("DPO", "SFT", "GRPO"))
BUILDERS: dict[str, Build] = {kind: partial(build, kind) for kind in KINDS} | {
    "KTO": partial(build, "KTO", beta=0.5)
}
