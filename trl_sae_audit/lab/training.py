"""DPO on a preference set of the lab: TRL's own trainer, with the lab's settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from .world import World

Shape = Callable[[Dataset, float], Dataset]
"""(the trainer's own dataset with reference log-probabilities, β) → the same with a shifted margin."""


def dpo_arguments(
    output_dir: str | os.PathLike[str], steps: int = 40, seed: int = 0, **overrides: Any
) -> DPOConfig:
    """DPO settings that change the lab's model in seconds on one CPU core: 16 pairs a step, a constant learning rate.

    Args:
        output_dir: the trainer's. Nothing is saved in it.
        steps: optimizer steps.
        seed: of the order of the pairs.
        overrides: any other fields of DPOConfig.
    """
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": max(1, steps // 8),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return DPOConfig(output_dir=str(output_dir), **(settings | overrides))


def train_dpo(
    world: World,
    pairs: Dataset,
    args: DPOConfig,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    shape: Shape | None = None,
    model: Any = None,
) -> Any:
    """Train a model of the world on pairs, and return it.

    Args:
        world: its model and tokenizer.
        pairs: columns prompt, chosen, rejected, and any others.
        args: from `dpo_arguments`.
        callbacks: for the trainer.
        shape: shapes the dataset, e.g. `lambda pairs, beta: shape_preference_margin(pairs, scorer, flags, beta=beta)`.
        model: what to train, in place; by default a fresh copy of the world's own.
    """
    args.precompute_ref_log_probs = shape is not None
    model = world.model() if model is None else model
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=world.tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    if shape is not None:
        trainer.train_dataset = shape(trainer.train_dataset, trainer.args.beta)
    trainer.train()
    return model
