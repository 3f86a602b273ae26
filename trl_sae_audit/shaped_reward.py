"""A reward function for GRPO, RLOO and OnlineDPO, with a penalty on flagged features taken off it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from .errors import AuditError
from .flags import Flag
from .log_once import NextLog
from .penalties import Penalty
from .reward_models import awaited, model_as_function, name_of
from .rollout import trainer_of_function
from .scorer import FeatureScorer
from .shaping import Shaper, checked_rewards


class ShapedReward:
    """`r' = r − penalty`, to pass in `reward_funcs`.

    Keeps the inner reward's name for the trainer's logs, hands every keyword on, leaves None as None, and logs
    `shaping/reward`, `shaping/penalty`, `shaping/penalty_share`, `shaping/{label}/score` and
    `shaping/{label}/coefficient`: through `log_metric`, or in the next log of a trainer that has none. Of an async reward the shaped one is async too.

    Args:
        reward: a function `f(prompts, completions, completion_ids, **kwargs)` → numbers or None, async or not; or a
            sequence classification model of one label.
        scorer: frozen model and dictionary.
        flags: of the scorer's dictionary.
        penalty: FixedPenalty, AdaptivePenalty, or a coefficient.
        reward_tokenizer: of a reward that is a model.

    Raises:
        AuditError: flags that do not fit the scorer; a model without tokenizer; and when called, a reward that is
            NaN or no single number.

    Example:

    ```python
    shaped = ShapedReward(my_reward, scorer, flags, penalty=AdaptivePenalty())
    shaped.learn_from(prompts, responses)     # of the reference model: what the reward pays is known from the first step on
    trainer = GRPOTrainer(model, reward_funcs=shaped, callbacks=[ShapingCallback(shaped)], ...)
    ```
    """

    def __new__(cls, reward: Any, *args: Any, **kwargs: Any) -> ShapedReward:
        chosen = _AsyncShapedReward if cls is ShapedReward and _is_async(reward) else cls
        return object.__new__(chosen)

    def __init__(
        self,
        reward: Callable[..., Any] | nn.Module,
        scorer: FeatureScorer | None,
        flags: Iterable[Flag],
        penalty: Penalty | float,
        *,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if not callable(reward):
            raise AuditError(f"The reward is a {type(reward).__name__}; pass a function or a reward model.")
        self.shaper = Shaper(scorer, flags, penalty)
        self.__name__ = name_of(reward)
        self._next_log = NextLog()
        self._inner: Callable[..., Any] = (
            model_as_function(reward, reward_tokenizer) if isinstance(reward, nn.Module) else reward
        )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Any:
        trainer, learning = self._begin(kwargs)
        rewards = self._shape(
            prompts, completions, self._ask(prompts, completions, kwargs), learning=learning
        )
        self._log(trainer, kwargs, learning=learning)
        return rewards

    def learn_from(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> None:
        """Let the penalty see what the reward pays for these responses, before training: it counts as a batch.

        Args:
            prompts: as the trainer would pass them.
            completions: responses of the reference model, those the scorer was calibrated on say.
            columns: whatever else the reward reads.
        """
        self.shaper.begin(None, learning=True)
        returned = awaited(self._ask(prompts, completions, columns))
        self._shape(prompts, completions, returned, learning=True)

    def _ask(self, prompts: Sequence[Any], completions: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return self._inner(prompts=prompts, completions=completions, **kwargs)

    def _begin(self, kwargs: dict[str, Any]) -> tuple[Trainer | None, bool]:
        trainer = trainer_of_function(kwargs)
        learning = trainer is None or bool(trainer.model.training)
        self.shaper.begin(trainer, learning=learning)
        return trainer, learning

    def _shape(
        self, prompts: Sequence[Any], completions: Sequence[Any], returned: Any, *, learning: bool
    ) -> list[float | None]:
        rewards = checked_rewards(returned, len(completions), self.__name__)
        off = self.shaper.penalties(self.shaper.score(prompts, completions), rewards, learning=learning)
        return [
            None if reward is None else reward - less
            for reward, less in zip(rewards, off.tolist(), strict=True)
        ]

    def _log(self, trainer: Trainer | None, kwargs: dict[str, Any], *, learning: bool) -> None:
        if "log_metric" in kwargs:
            for name, value in self.shaper.metrics.items():
                kwargs["log_metric"](name, value)
        elif trainer is not None and learning:
            self._next_log.add(trainer, self.shaper.metrics)


class _AsyncShapedReward(ShapedReward):
    """The shaped form of an async reward. Coefficients move before the first await, so that several async
    rewards communicate in the same order on every process."""

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Any:
        trainer, learning = self._begin(kwargs)
        returned = await self._ask(prompts, completions, kwargs)
        rewards = self._shape(prompts, completions, returned, learning=learning)
        self._log(trainer, kwargs, learning=learning)
        return rewards


def _is_async(reward: Any) -> bool:
    while isinstance(reward, functools.partial):
        reward = reward.func
    if isinstance(reward, nn.Module) or not callable(reward):
        return False
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(reward.__call__)
