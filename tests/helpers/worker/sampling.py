"""GRPO and PPO, which answer prompts themselves."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

from helpers.worker.observed import recorded, run
from helpers.worker.settings import GLOBAL_BATCH, SETTINGS, share_of_batch
from helpers.worlds import WORDS, make_model, make_tokenizer, prompts, reward_by_length


def written(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """What a policy that ignores its weights answers: given by the prompt, the place in its group and the step."""
    tokenizer = trainer.processing_class
    answers, places = [], {}
    for prompt in prompts:
        place = places[prompt] = places.get(prompt, -1) + 1
        choose = random.Random(f"{prompt} {place % 4} {trainer.state.global_step}")
        words = " ".join(choose.choices(WORDS, k=choose.randint(1, 5)))
        answers.append([*tokenizer(words)["input_ids"], tokenizer.eos_token_id])
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": answers,
        "logprobs": None,
    }


def grpo_trainer(directory: Path, rewards: Any) -> Any:
    from helpers.trainers import arguments
    from trl import GRPOConfig, GRPOTrainer

    settings = {
        **SETTINGS,
        "per_device_train_batch_size": 16 // int(os.environ["WORLD_SIZE"]),
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 6,
        "beta": 0.0,
    }
    return GRPOTrainer(
        make_model(make_tokenizer()),
        reward_funcs=rewards,
        args=GRPOConfig(**arguments(directory, **settings)),
        train_dataset=prompts(24),
        processing_class=make_tokenizer(),
        rollout_func=written,
    )


def grpo(directory: Path) -> dict[str, Any]:
    return run(grpo_trainer(directory, reward_by_length), directory, token_scores=True)


def grpo_sampled(directory: Path) -> dict[str, Any]:
    """Every process samples answers of its own."""
    from helpers.trainers import BUILDERS

    trainer = BUILDERS["GRPO"](
        directory,
        learning_rate=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=2,
    )
    return run(trainer, directory, recorder=recorded(trainer), token_scores=True)


def grpo_one_sided(directory: Path) -> dict[str, Any]:
    """Process 0 has groups with better and worse answers, the others only groups whose answers are all alike."""

    def rewards(completions: list[str], **columns: Any) -> list[float]:
        alike = int(os.environ["RANK"]) > 0
        return [1.0] * len(completions) if alike else reward_by_length(completions)

    return run(grpo_trainer(directory, rewards), directory, token_scores=True)


def ppo(directory: Path) -> dict[str, Any]:
    """Prompts in their order, the likeliest answers, of one length, advantages as they are: nothing depends on the partition."""
    from helpers.ppo import ppo as build
    from trl.experimental.ppo import ppo_trainer

    def likeliest(model: Any, queries: Any, batch: int, pad: int, config: Any) -> Any:
        config = copy.deepcopy(config)
        config.do_sample, config.min_new_tokens = False, config.max_new_tokens
        return sampled(model, queries, batch, pad, config)

    sampled, ppo_trainer.batch_generation = ppo_trainer.batch_generation, likeliest
    ppo_trainer.masked_whiten = lambda values, mask, shift_mean=True: values
    loader = ppo_trainer.DataLoader
    ppo_trainer.DataLoader = lambda *args, **kwargs: loader(*args, **{**kwargs, "shuffle": False})
    trainer = build(
        directory,
        per_device_train_batch_size=share_of_batch() // 2,
        gradient_accumulation_steps=2,
        num_mini_batches=1,
        total_episodes=2
        * GLOBAL_BATCH,  # of the last batch there is accelerate makes a step of every micro-batch
        stop_token=None,
        **SETTINGS,
    )
    return run(trainer, directory, token_scores=True)
