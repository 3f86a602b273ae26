"""Rewards as TRL's GRPOTrainer takes them in `reward_funcs`, called as it calls them.

The one place that knows this protocol: audits, shaped rewards and their tests go through it, and a test holds it against
`GRPOTrainer._calculate_rewards` itself.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
import trl.trainer.utils
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState

from ..errors import AuditError
from .event_loop import wait_for
from .reward_models import (
    TemplateOptions,
    find_classifier,
    load_reward_model,
    load_reward_tokenizer,
    model_as_function,
    model_id,
)
from .reward_values import check_rewards
from .tokenizers import Processing, text_tokenizer

logger = logging.getLogger(__name__)


class RewardFunction(Protocol):
    """`f(prompts=…, completions=…, completion_ids=…, **columns)` → a number or None for each completion, async or not."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], **keywords: Any) -> Any: ...


Reward: TypeAlias = Callable[..., Any] | nn.Module | str
"""A reward function; a sequence classification model of one label; or a string, see `load_reward`."""

_OWN = ("prompt", "completion", "completion_ids")
_RESERVED = ("prompts", "completions")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Rewards:
    """One or several rewards of a batch of completions.

    Args:
        rewards: functions, models or strings, as GRPOTrainer's `reward_funcs`.
        tokenizers: of those that are models; one for all, or a list as long as `rewards`. None to load each from where its model
            was loaded.
        weights: of each, as GRPOConfig's `reward_weights`; 1 by default.
        state: what the functions get as `trainer_state`; by default that of a run that has not begun.
        batch_size: texts in one forward pass of a model; None for all of a batch.
        fallback: tokenizer for a model whose own cannot be loaded, made in memory say.

    Attributes:
        names: what TRL calls the rewards in its logs.
        weights: float32 [rewards].

    Raises:
        AuditError: no reward, another number of weights or tokenizers, a string that names none, or a model without tokenizer or of
            several labels.
    """

    def __init__(
        self,
        rewards: Reward | Sequence[Reward],
        tokenizers: Processing | Sequence[Processing | None] | None = None,
        weights: Sequence[float] | None = None,
        *,
        state: TrainerState | None = None,
        batch_size: int | None = None,
        fallback: Processing | None = None,
    ) -> None:
        given = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        readers = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(given)
        for noun, values in (("weights", weights), ("tokenizers", readers)):
            if values is not None and len(values) != len(given):
                raise AuditError(
                    f"There are {len(given)} rewards and {len(values)} {noun}; give one for each."
                )
        if not given:
            raise AuditError("There is no reward; pass a function or a reward model.")
        loaded = [load_reward(each) if isinstance(each, str) else each for each in given]
        self.names = [reward_name(each) for each in loaded]
        self.weights = torch.tensor(
            [1.0] * len(given) if weights is None else list(weights), dtype=torch.float32
        )
        readers = [_reader(*pair, fallback) for pair in zip(loaded, readers, strict=True)]
        self._functions = [as_function(*pair, batch_size) for pair in zip(loaded, readers, strict=True)]
        self._state = TrainerState(max_steps=1, num_train_epochs=1) if state is None else state

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Each reward of each row: float32 [rows, rewards], NaN where a function returned None.

        Args:
            rows: with `prompt`, `completion` and `completion_ids`, all texts or all lists of messages. The functions get every other
                column as a keyword.

        Raises:
            AuditError: a function that cannot be called so, or returns something else than one finite number or None for each.
        """
        keywords = self._keywords(rows)
        found = torch.zeros(len(rows), len(self._functions), dtype=torch.float32)
        waiting: dict[int, Any] = {}
        for column, function in enumerate(self._functions):
            _check_signature(function, keywords, self.names[column])
            if is_async(function):
                waiting[column] = function
            else:
                found[:, column] = self._checked(wait_for(function(**keywords)), column, len(rows))
        for column, returned in zip(waiting, wait_for(_call_all(waiting.values(), keywords)), strict=True):
            found[:, column] = self._checked(returned, column, len(rows))
        return found

    def combine(self, values: Tensor) -> Tensor:
        """The weighted sum of what `__call__` gives, over those that are not NaN: [rows]; NaN where all of them are."""
        total = (values * self.weights).nansum(1)
        return total.masked_fill(values.isnan().all(1), math.nan)

    def _keywords(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = dict.fromkeys(name for row in rows for name in row if name not in _OWN)
        if taken := [name for name in columns if name in _RESERVED]:
            raise AuditError(
                f"The dataset has a column {taken[0]!r}, which TRL's trainers pass to rewards themselves; rename it."
            )
        return {
            "prompts": [row["prompt"] for row in rows],
            "completions": [row["completion"] for row in rows],
            "completion_ids": [row["completion_ids"] for row in rows],
            **{name: [row.get(name) for row in rows] for name in columns},
            "trainer_state": self._state,
            "log_extra": _ignore,
            "log_metric": _ignore,
        }

    def _checked(self, returned: Any, column: int, rows: int) -> Tensor:
        values = check_rewards(returned, rows, self.names[column])
        return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)


def _reader(reward: Any, tokenizer: Processing | None, fallback: Processing | None) -> Processing | None:
    if tokenizer is not None or fallback is None or not isinstance(reward, nn.Module):
        return tokenizer
    try:
        own = load_reward_tokenizer(reward)
    except AuditError as error:
        logger.warning("The policy's tokenizer reads the texts for the reward model instead. %s", error)
        own = None
    if own is None and (classifier := find_classifier(reward)) is not None:
        text_tokenizer(fallback, classifier, classifies=True)
    return fallback if own is None else own


async def _call_all(functions: Any, keywords: Mapping[str, Any]) -> list[Any]:
    """All at once, as in TRL: the slowest decides how long it takes."""
    return await asyncio.gather(*(function(**keywords) for function in functions))


def _ignore(name: str, value: Any) -> None:
    """In the place of `log_extra` and `log_metric`, which outside a training have nowhere to log to."""


def _check_signature(function: Callable[..., Any], keywords: Mapping[str, Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some that are written in C
        return
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise AuditError(
            f"Reward {name!r} cannot be called as TRL's trainers call it ({error}); let it take **kwargs."
        ) from error


def load_reward(name: str) -> Callable[..., Any] | nn.Module:
    """What a string names: `package.module:function`, of a module installed or in the current directory; or a reward model.

    Raises:
        AuditError: if it is neither.
    """
    if not names_function(name):
        return load_reward_model(name)
    module, _, path = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise AuditError(
            f"The reward {name!r} cannot be imported ({error}); name a function as module:function, of a module that is installed "
            "or in the current directory."
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise AuditError(
                f"The reward {name!r} cannot be imported: module {module!r} has no {path!r}; name a function that it has."
            )
        found = getattr(found, part)
    if not callable(found):
        raise AuditError(f"The reward {name!r} is a {type(found).__name__}; name a function.")
    return found


def names_function(reward: Any) -> bool:
    """Whether a reward is a string that names a function, not a model."""
    return isinstance(reward, str) and bool(_FUNCTION.fullmatch(reward)) and not Path(reward).exists()


def as_function(
    reward: Any,
    tokenizer: Processing | None,
    batch_size: int | None = None,
    template: TemplateOptions = dict,
) -> Callable[..., Any]:
    """A reward model as a function; a function as it is.

    Raises:
        AuditError: neither of them; or as `model_as_function`.
    """
    if isinstance(reward, nn.Module):
        return model_as_function(reward, tokenizer, batch_size, template)
    if not callable(reward):
        raise AuditError(f"The reward is a {type(reward).__name__}; pass a function or a reward model.")
    return reward


def is_async(reward: Any) -> bool:
    """Whether calling a reward gives a coroutine, told as TRL does: functions, partials of them, and objects that are called."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    if isinstance(reward, nn.Module) or not callable(reward):
        return False
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(reward.__call__)


def trl_awaits_objects() -> bool:
    """Whether this TRL awaits an object whose call is async, as 1.13 and later do, or functions alone."""
    return hasattr(trl.trainer.utils, "is_async_callable")


def reward_name(reward: Any) -> str:
    """What TRL would call the reward in its logs."""
    if isinstance(reward, PreTrainedModel):
        return model_id(reward).split("/")[-1] or type(reward).__name__
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward.__name__ if hasattr(reward, "__name__") else type(reward).__name__
