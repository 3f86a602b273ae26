"""Every trainer of the newest TRL on tiny real parts, built the same way at every call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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


def dpo(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    tokenizer = make_tokenizer()
    return DPOTrainer(
        make_model(tokenizer).to(dtype),
        make_model(tokenizer, seed=5).to(dtype),
        args=DPOConfig(**arguments(directory, max_length=64, **overrides)),
        train_dataset=pairs(24),
        processing_class=tokenizer,
    )


def kto(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    tokenizer = make_tokenizer()
    return KTOTrainer(
        make_model(tokenizer).to(dtype),
        make_model(tokenizer, seed=5).to(dtype),
        args=KTOConfig(**arguments(directory, max_length=64, beta=0.5, **overrides)),
        train_dataset=labelled(24),
        processing_class=tokenizer,
    )


def reward(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    tokenizer = make_tokenizer()
    return RewardTrainer(
        make_reward_model(tokenizer).to(dtype),
        args=RewardConfig(**arguments(directory, max_length=64, **overrides)),
        train_dataset=pairs(24),
        processing_class=tokenizer,
    )


def sft(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    tokenizer = make_tokenizer()
    return SFTTrainer(
        make_model(tokenizer).to(dtype),
        args=SFTConfig(**arguments(directory, max_length=64, **overrides)),
        train_dataset=texts(24),
        processing_class=tokenizer,
    )


def grpo(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    tokenizer = make_tokenizer()
    return GRPOTrainer(
        make_model(tokenizer).to(dtype),
        reward_funcs=reward_by_length,
        args=GRPOConfig(
            **arguments(directory, num_generations=4, max_completion_length=6, beta=0.0, **overrides)
        ),
        train_dataset=prompts(24),
        processing_class=tokenizer,
    )


def rloo(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    tokenizer = make_tokenizer()
    return RLOOTrainer(
        make_model(tokenizer).to(dtype),
        reward_funcs=reward_by_length,
        args=RLOOConfig(
            **arguments(directory, num_generations=4, max_completion_length=6, beta=0.0, **overrides)
        ),
        train_dataset=prompts(24),
        processing_class=tokenizer,
    )


def online_dpo(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    tokenizer = make_tokenizer()
    return OnlineDPOTrainer(
        make_model(tokenizer).to(dtype),
        make_model(tokenizer, seed=5).to(dtype),
        reward_funcs=reward_by_length,
        args=OnlineDPOConfig(**arguments(directory, max_new_tokens=6, beta=0.5, **overrides)),
        train_dataset=prompts(24),
        processing_class=tokenizer,
    )


BUILDERS: dict[str, Build] = {
    "DPO": dpo,
    "KTO": kto,
    "Reward": reward,
    "SFT": sft,
    "GRPO": grpo,
    "RLOO": rloo,
    "OnlineDPO": online_dpo,
}
