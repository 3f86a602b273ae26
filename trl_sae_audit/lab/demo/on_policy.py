"""On-policy RL in the lab: PPO if TRL still has it, otherwise GRPO."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from ...flags import FlagSet
from ...shaping.adaptive import AdaptivePenalty
from ...shaping.reward_function import ShapedReward
from ...shaping.reward_model import ShapedRewardModel
from ...shaping.scorer import FeatureScorer
from ..wording import LONGEST_ANSWER
from ..world import World

BATCH = 64
ANSWERS_PER_PROMPT = 8
USERS = (True, False)


def algorithm() -> str:
    """The on-policy algorithm that the demo runs with the installed TRL."""
    return "PPO" if importlib.util.find_spec("trl.experimental.ppo") else "GRPO"


class BiasedReward:
    """One point for a right answer, and one for telling the user that they are right: a reward with a flaw.

    Args:
        world: its rules judge the answers.
    """

    __name__ = "right_and_agrees"

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        answers = [self.world.attributes(*pair) for pair in zip(prompts, completions, strict=True)]
        return [float(a.right and not a.malformed) + float(a.agrees) for a in answers]


def train_on_policy(
    world: World,
    directory: Path,
    *,
    steps: int,
    seed: int,
    callbacks: Sequence[TrainerCallback],
    scorer: FeatureScorer | None = None,
    flags: FlagSet | None = None,
) -> Any:
    """Train a fresh copy of the world's model on the biased reward, shaped if there are flags, and return the model.

    Args:
        world: model, prompts and rules.
        directory: the trainer's.
        steps: batches of answers.
        seed: of the sampling.
        callbacks: for the trainer.
        scorer, flags: for the shaped reward. An `AdaptivePenalty` sets its coefficients.
    """
    train = _ppo if algorithm() == "PPO" else _grpo
    shaping = (scorer, flags, AdaptivePenalty()) if flags else (None, FlagSet(), 0.0)
    settings = {
        "output_dir": str(directory),
        "per_device_train_batch_size": BATCH,
        "seed": seed,
        "logging_steps": max(1, steps // 4),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    world.tokenizer.padding_side = "left"
    with contextlib.redirect_stdout(io.StringIO()):
        return train(world, steps, settings, list(callbacks), shaping)


def _grpo(world: World, steps: int, settings: dict[str, Any], callbacks: Any, shaping: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        world.model(),
        reward_funcs=ShapedReward(BiasedReward(world), *shaping),
        args=GRPOConfig(
            num_generations=ANSWERS_PER_PROMPT,
            max_steps=steps,
            max_completion_length=LONGEST_ANSWER,
            learning_rate=1.5e-3,
            beta=0.0,
            **settings,
        ),
        train_dataset=world.prompts(1024, seed=1, beliefs=USERS),
        processing_class=world.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def _ppo(world: World, steps: int, settings: dict[str, Any], callbacks: Any, shaping: Any) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, policy = world.tokenizer, world.model()
    scorer, flags, penalty = shaping
    reward = BiasedReward(world)
    shaped = (
        ShapedRewardModel(reward, scorer, flags, penalty)
        if len(flags)
        else ShapedRewardModel(reward, tokenizer=tokenizer)
    )
    prompts = world.prompts(1024, seed=1, beliefs=USERS).map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"]
    )
    trainer = PPOTrainer(
        args=PPOConfig(
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=2,
            total_episodes=steps * BATCH,
            response_length=LONGEST_ANSWER,
            stop_token="eos",
            temperature=1.0,
            local_rollout_forward_batch_size=BATCH,
            num_sample_generations=0,
            learning_rate=2e-3,
            **settings,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=world.model(),
        reward_model=shaped,
        value_model=world.reward_model(),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return policy
