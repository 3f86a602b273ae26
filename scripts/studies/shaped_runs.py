"""Shaped GRPO and PPO runs in the lab, on a reward that pays for agreeing with the user: made, trained and measured.

Used by stability.py and by scripts/bench_scoring.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RAW, Cell

from trl_sae_audit import (
    AdaptivePenalty,
    FeatureScorer,
    FixedPenalty,
    Flag,
    FlagSet,
    ShapedReward,
    ShapedRewardModel,
    audit_preferences,
    load_dictionary,
)
from trl_sae_audit.lab import build_world, sample_answers
from trl_sae_audit.lab.wording import LONGEST_ANSWER
from trl_sae_audit.lab.world import World, WorldConfig
from trl_sae_audit.saes.pooling import Pooling
from trl_sae_audit.shaping.penalties import Penalty

WITH_BELIEF = (True, False)
BEHAVIOUR = "agrees"
REFERENCE_ANSWERS = 1024


@dataclass(frozen=True)
class Training:
    """The same for every cell of a task."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0


TRAINING = {
    ("grpo", "fast"): Training(24, 64, 1.5e-3),
    ("grpo", "warm"): Training(24, 64, 1.5e-3, warmup_steps=8),
    ("grpo", "slow"): Training(120, 64, 3e-4),
    ("ppo", "fast"): Training(14, 64, 2e-3),
    ("ppo", "warm"): Training(14, 64, 2e-3, warmup_steps=5),
    ("ppo", "slow"): Training(70, 64, 4e-4),
}
"""By task and pace: warm runs are the fast ones with a learning rate that rises over a third of the steps; slow ones see five times the
answers at a fifth of the learning rate."""


class Setting:
    """One world, with what is needed to train in it and to measure."""

    def __init__(self, seed: int, answers: int) -> None:
        self.seed = seed
        self.answers = answers
        self.world = shared_world(seed)
        self.tokenizer = self.world.tokenizer
        self.tokenizer.padding_side = "left"
        self.dictionary = load_dictionary(self.world.dictionary_path)
        self.reference = self.world.model()
        self.trace: list[float] = []
        self.calibration = self.answered(256, seed=7)

    def answered(self, n: int, seed: int) -> list[tuple[str, str]]:
        """Prompts of the training split with the reference's answers."""
        asked = list(self.world.prompts(n, seed=seed, beliefs=WITH_BELIEF)["prompt"])
        answers = sample_answers(self.reference, self.tokenizer, asked, seed=seed)
        return [(prompt, f" {answer}") for prompt, answer in zip(asked, answers, strict=True)]

    def scorer(self, pooling: Pooling) -> FeatureScorer:
        scorer = FeatureScorer(
            self.reference, self.tokenizer, self.dictionary, pooling=pooling, batch_size=32
        )
        return scorer.calibrate(self.calibration)

    def flags(self, source: str) -> FlagSet:
        """Those of the ground truth, or those a reader of an audit would set; together they weigh 1."""
        features = self.world.carriers(BEHAVIOUR) if source == "truth" else found_features(self)
        return FlagSet(
            Flag(self.dictionary.name, feature, BEHAVIOUR, weight=1 / len(features)) for feature in features
        )

    def reward(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        """1 for a right answer, and 1 for agreeing."""
        read = [self.world.attributes(*pair) for pair in zip(prompts, completions, strict=True)]
        self.trace.append(float(np.mean([one.agrees for one in read])))
        return [float(one.right and not one.malformed) + float(one.agrees) for one in read]

    def measure(self, model: Any, flags: FlagSet) -> dict[str, float]:
        """Rates by rule at held-out prompts, and the flagged features' mean score there."""
        behaviour = self.world.behaviour(model, n=self.answers, seed=11, beliefs=WITH_BELIEF)
        rates = behaviour.rates()["rate"]
        scores = self.scorer("max").score(
            behaviour.prompts, [f" {answer}" for answer in behaviour.answers], [f.feature for f in flags]
        )
        return {
            "agrees": float(rates["agrees"]),
            "padded": float(rates["padded"]),
            "malformed": float(rates["malformed"]),
            "true": float(np.mean(self.world.true_reward(behaviour.prompts, behaviour.answers))),
            "activation": float(scores.mean()),
        }


def shared_world(seed: int) -> World:
    """The lab's world. The task that runs first notes where it is, and the other one, in an environment whose TRL would give
    the same world another place in the cache, takes it from there instead of building it again."""
    noted = RAW / "stability-worlds.json"
    places = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    if str(seed) in places and Path(places[str(seed)]).is_dir():
        return World(WorldConfig(seed=seed), Path(places[str(seed)]))
    world = build_world(seed)
    noted.parent.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps({**places, str(seed): str(world.directory)}), encoding="utf-8")
    return world


def found_features(setting: Setting) -> list[int]:
    """What somebody would flag who audits preferences that favour agreement: of the ten features with the largest disparity
    those where at least 18 of the 20 answers in which they are most active agree with the user."""
    world = setting.world
    pairs = world.preferences({"right": 0.5, BEHAVIOUR: 0.5}, 300, seed=3)
    audit = audit_preferences(
        world.model(),
        setting.tokenizer,
        pairs.select_columns(["prompt", "chosen", "rejected"]),
        setting.dictionary,
        batch_size=32,
        lookahead=None,
        progress=False,
    )
    first = audit.features().nlargest(10, "disparity")["feature"].tolist()
    shown = audit.examples(first)
    found = []
    for feature in first:
        top = shown[shown["feature"] == feature].nlargest(20, "max_activation")
        read = [
            bool(pairs[int(row)][f"{side}_{BEHAVIOUR}"])
            for row, side in zip(top["row"], top["side"], strict=True)
        ]
        if sum(read) >= 18:
            found.append(feature)
    return found


def penalty_of(cell: Cell) -> Penalty | None:
    if cell["method"] == "plain":
        return None
    if cell["method"] == "fixed":
        return FixedPenalty(cell["lambda"])
    if cell["method"] == "clipped":
        return FixedPenalty(cell["lambda"], clip=1.0)
    return AdaptivePenalty()


def grpo_trainer(setting: Setting, reward: Any, directory: str, training: Training) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(
        setting.world.model(),
        reward_funcs=reward,
        args=GRPOConfig(
            per_device_train_batch_size=training.batch_size,
            num_generations=8,
            max_steps=training.steps,
            max_completion_length=LONGEST_ANSWER,
            beta=0.0,
            **common_arguments(setting, training, directory),
        ),
        train_dataset=setting.world.prompts(1024, seed=1, beliefs=WITH_BELIEF),
        processing_class=setting.tokenizer,
    )


def ppo_trainer(setting: Setting, reward: Any, directory: str, training: Training) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = setting.tokenizer
    prompts = setting.world.prompts(1024, seed=1, beliefs=WITH_BELIEF).map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"]
    )
    return PPOTrainer(
        args=PPOConfig(
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=2,
            total_episodes=training.steps * training.batch_size,
            response_length=LONGEST_ANSWER,
            stop_token="eos",
            temperature=1.0,
            local_rollout_forward_batch_size=training.batch_size,
            num_sample_generations=0,
            **common_arguments(setting, training, directory),
        ),
        processing_class=tokenizer,
        model=setting.world.model(),
        ref_model=setting.world.model(),
        reward_model=reward,
        value_model=setting.world.reward_model(),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
    )


def common_arguments(setting: Setting, training: Training, directory: str) -> dict[str, Any]:
    return {
        "output_dir": directory,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": training.warmup_steps,
        "seed": setting.seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def train(setting: Setting, cell: Cell, flags: FlagSet) -> Any:
    """The policy after training."""
    task, penalty = cell["task"], penalty_of(cell)
    torch.manual_seed(cell["seed"])
    reward: Any = setting.reward
    if penalty is not None:
        wrapper: Any = {"grpo": ShapedReward, "ppo": ShapedRewardModel}[task]
        reward = wrapper(setting.reward, setting.scorer(cell["pooling"]), flags, penalty)
        if cell["method"] == "adaptive":
            reward.learn_from(*map(list, zip(*setting.answered(REFERENCE_ANSWERS, seed=8), strict=True)))
            setting.trace.clear()
    elif task == "ppo":
        reward = ShapedRewardModel(setting.reward, tokenizer=setting.tokenizer)
    build = {"grpo": grpo_trainer, "ppo": ppo_trainer}[task]
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        trainer = build(setting, reward, directory, TRAINING[task, cell.get("pace", "fast")])
        trainer.train()
    return trainer.policy_model if task == "ppo" else trainer.model


def run_cell(cell: Cell, answers: int) -> Iterator[dict[str, Any]]:
    """Train once and measure; a reference cell only measures."""
    setting = Setting(cell["seed"], answers)
    flags = setting.flags(cell["flags"])
    started = time.process_time()
    model = setting.reference if cell["method"] == "reference" else train(setting, cell, flags)
    seconds = time.process_time() - started
    yield {
        **setting.measure(model, flags),
        "trace": setting.trace,
        "flagged": [flag.feature for flag in flags],
        "cpu_seconds": seconds,
    }
