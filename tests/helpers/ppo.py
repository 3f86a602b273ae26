"""TRL 1.12's PPO on tiny real parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from helpers.trainers import arguments
from helpers.worlds import make_model, make_reward_model, make_tokenizer, prompts

TEMPERATURE = 0.9


def ppo(directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Trainer:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    dataset = prompts(24).map(
        lambda row: tokenizer(row["prompt"], padding=False),
        remove_columns=["prompt"],
        load_from_cache_file=False,
    )
    return PPOTrainer(
        args=PPOConfig(
            **arguments(
                directory,
                **{
                    "per_device_train_batch_size": 2,
                    "num_mini_batches": 2,
                    "num_ppo_epochs": 2,
                    "total_episodes": 16,
                    "max_steps": -1,
                    "response_length": 6,
                    "stop_token": "eos",
                    "temperature": TEMPERATURE,
                    "local_rollout_forward_batch_size": 8,
                    "num_sample_generations": 0,
                    "logging_steps": 1,
                    **overrides,
                },
            )
        ),
        processing_class=tokenizer,
        model=make_model(tokenizer).to(dtype),
        ref_model=make_model(tokenizer, seed=5).to(dtype),
        reward_model=make_reward_model(tokenizer).to(dtype),
        value_model=make_reward_model(tokenizer, seed=4).to(dtype),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
    )
