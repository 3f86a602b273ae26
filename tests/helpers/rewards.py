"""Rewards of every form that TRL's GRPOTrainer takes, and what its own call makes of them."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from helpers.worlds import make_model, make_reward_model, make_tokenizer, reward_by_length, words


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def by_length(completions: list[Any], **columns: Any) -> list[float]:
    """Different in every group."""
    return reward_by_length([text_of(completion) for completion in completions])


def by_message(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Reads messages, as rewards of conversations do."""
    return [
        float(len(c[0]["content"])) + len(p[-1]["content"]) + (c[0]["role"] == "assistant")
        for p, c in zip(prompts, completions, strict=True)
    ]


def by_ids(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(ids) / 7 for ids in completion_ids]


def by_state(completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
    done = trainer_state.global_step / trainer_state.max_steps
    return [value + done for value in by_length(completions)]


def by_logging(completions: list[Any], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
    log_extra("said", [text_of(completion) for completion in completions])
    log_metric("count", float(len(completions)))
    return by_length(completions)


def by_column(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """The dataset's column `answer` gives 1 where the completion has it."""
    return [
        float(right in text_of(completion).split())
        for right, completion in zip(answer, completions, strict=True)
    ]


async def awaited(completions: list[Any], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return by_length(completions)


class Judge:
    """An object that is called."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        return [self.scale * value for value in by_length(completions)]


class AsyncJudge(Judge):
    async def __call__(self, completions: list[Any], **columns: Any) -> list[float]:  # type: ignore[override]
        await asyncio.sleep(0)
        return Judge.__call__(self, completions)


def as_tensor(completions: list[Any], **columns: Any) -> Tensor:
    return torch.tensor(by_length(completions))


def as_array(completions: list[Any], **columns: Any) -> np.ndarray:
    return np.array(by_length(completions))


def as_scalars(completions: list[Any], **columns: Any) -> list[Any]:
    return [np.float32(value) for value in by_length(completions)]


def as_booleans(completions: list[Any], **columns: Any) -> list[bool]:
    return [value > 0.5 for value in by_length(completions)]


def sometimes(completions: list[Any], **columns: Any) -> list[float | None]:
    """Does not judge every second one."""
    return [value if place % 2 else None for place, value in enumerate(by_length(completions))]


def never(completions: list[Any], **columns: Any) -> list[None]:
    return [None] * len(completions)


def reward_model(*, padded: bool = True, pad: bool = True) -> Any:
    """A model whose config has a padding token, and a tokenizer that has one, or not."""
    tokenizer = make_tokenizer()
    model = make_reward_model(tokenizer).eval()
    if not padded:
        model.config.pad_token_id = None
    if not pad:
        tokenizer.pad_token = None
    model.config.name_or_path = "org/judge"
    return model, tokenizer


@dataclass(frozen=True)
class Protocol:
    """Rewards as they may come."""

    rewards: Callable[[], list[Any]]
    conversational: bool = False
    tokenizers: Callable[[], list[Any]] | None = None
    weights: list[float] | None = None


def _with_model(**options: bool) -> Protocol:
    return Protocol(lambda: [reward_model(**options)[0]], tokenizers=lambda: [reward_model(**options)[1]])


PROTOCOLS = {
    "a function of texts": Protocol(lambda: [by_length]),
    "a function of messages": Protocol(lambda: [by_message], conversational=True),
    "completion_ids": Protocol(lambda: [by_ids]),
    "trainer_state": Protocol(lambda: [by_state]),
    "log_extra and log_metric": Protocol(lambda: [by_logging]),
    "a column of the dataset": Protocol(lambda: [by_column]),
    "a column, of conversations": Protocol(lambda: [by_column], conversational=True),
    "a coroutine function": Protocol(lambda: [awaited]),
    "an object": Protocol(lambda: [Judge(0.5)]),
    "an object with an async call": Protocol(lambda: [AsyncJudge(0.5)]),
    "a partial": Protocol(lambda: [functools.partial(Judge(2.0).__call__)]),
    "a partial of a coroutine function": Protocol(lambda: [functools.partial(awaited)]),
    "a tensor returned": Protocol(lambda: [as_tensor]),
    "an array returned": Protocol(lambda: [as_array]),
    "NumPy scalars returned": Protocol(lambda: [as_scalars]),
    "booleans returned": Protocol(lambda: [as_booleans]),
    "None for some": Protocol(lambda: [sometimes]),
    "None for all": Protocol(lambda: [never]),
    "several with weights": Protocol(
        lambda: [by_length, awaited, sometimes, AsyncJudge(3.0)], weights=[1.0, 0.5, -2.0, 0.25]
    ),
    "a reward model": _with_model(),
    "a reward model of conversations": Protocol(
        lambda: [reward_model()[0]], conversational=True, tokenizers=lambda: [reward_model()[1]]
    ),
    "a reward model, tokenizer without padding": _with_model(pad=False),
    "a reward model, config without padding": _with_model(padded=False),
    "a reward model, neither with padding": _with_model(padded=False, pad=False),
    "a model and a function": Protocol(
        lambda: [reward_model()[0], by_ids], tokenizers=lambda: [reward_model()[1], None], weights=[2.0, 0.1]
    ),
}


def _returns(values: Any) -> Protocol:
    def reward(completions: list[Any], **columns: Any) -> Any:
        return values(completions)

    return Protocol(lambda: [reward])


REFUSED = {
    "too few numbers": _returns(lambda completions: [1.0]),
    "NaN": _returns(lambda completions: [float("nan")] * len(completions)),
    "infinity": _returns(lambda completions: [float("inf")] * len(completions)),
    "text": _returns(lambda completions: ["good"] * len(completions)),
    "one number": _returns(lambda completions: 1.0),
    "lists of numbers": _returns(lambda completions: [[1.0, 2.0]] * len(completions)),
    "a matrix": _returns(lambda completions: torch.ones(len(completions), 2)),
}
"""What a reward must not return. TRL takes NaN for None and infinity for a number, and ends in a traceback at the rest."""


def data(conversational: bool, n: int = 4) -> Dataset:
    """Prompts, with a column that a reward may read."""
    rng = random.Random(3)
    rows = [{"prompt": words(rng, 2, 6) + " ", "answer": words(rng, 1, 1)} for _ in range(n)]
    if conversational:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    return Dataset.from_list(rows)


def answered(conversational: bool, answers: int = 4, n: int = 4) -> list[dict[str, Any]]:
    """Rows of prompt, completion and completion_ids, `answers` to each prompt, as GRPOTrainer makes them."""
    rng, tokenizer, rows = random.Random(5), make_tokenizer(), []
    for row in data(conversational, n):
        for _ in range(answers):
            text = words(rng, 1, 7)
            completion = [{"role": "assistant", "content": text}] if conversational else text
            rows.append({**row, "completion": completion, "completion_ids": tokenizer(text)["input_ids"]})
    return rows


def trainer_of(protocol: Protocol, directory: Path, **options: Any) -> GRPOTrainer:
    """A GRPOTrainer that pays these rewards."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "reward_weights": protocol.weights,
    }
    tokenizer = make_tokenizer()
    return GRPOTrainer(
        options.pop("model", None) or make_model(tokenizer),
        reward_funcs=options.pop("reward_funcs", None) or protocol.rewards(),
        reward_processing_classes=None if protocol.tokenizers is None else protocol.tokenizers(),
        args=GRPOConfig(str(directory), **(settings | options)),
        train_dataset=data(protocol.conversational),
        processing_class=tokenizer,
    )


def asked_by_trl(trainer: GRPOTrainer, rows: Sequence[dict[str, Any]]) -> Tensor:
    """What the trainer's own call makes of a batch: [rows, rewards]."""
    trainer.state.max_steps = 1
    columns = [{name: row[name] for name in ("prompt", "answer")} for row in rows]
    given = [[row[name] for row in rows] for name in ("prompt", "completion", "completion_ids")]
    return trainer._calculate_rewards(columns, *given)
