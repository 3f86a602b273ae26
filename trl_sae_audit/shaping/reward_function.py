"""A reward function for GRPO, RLOO and OnlineDPO, less a penalty on flagged features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import Trainer

from ..flags import Flag
from ..metric_names import PENALTY, feature_metric
from ..models.event_loop import wait_for
from ..models.reward_values import check_rewards
from ..models.rewards import (
    Reward,
    as_function,
    is_async,
    load_reward,
    names_function,
    reward_name,
    trl_awaits_objects,
)
from ..models.tokenizers import Processing
from ..trainers.logs import DeferredMetrics
from ..trainers.rollout import template_options, trainer_of_function
from .penalties import Penalty
from .scorer import FeatureScorer
from .shaper import Shaper


class ShapedReward:
    """`r' = r − penalty`, to pass in `reward_funcs`.

    Keeps the inner reward's name for the trainer's logs, hands every keyword on, leaves None as None, and logs
    `shaping/reward`, `shaping/penalty`, `shaping/penalty_share`, `shaping/{label}/score` and
    `shaping/{label}/coefficient`: through `log_metric`, or in the next log of a trainer that has none. In GRPO and RLOO each
    completion's scores and penalty are also columns of the trainer's table of completions (`log_completions=True`). Of an async reward
    the shaped one is async too; under a TRL that awaits functions alone (before 1.13) it waits for it.

    Args:
        reward: a function `f(prompts, completions, completion_ids, **kwargs)` → numbers or None, async or not; or a
            sequence classification model of one label; or the name of either, see `load_reward`.
        scorer: frozen model and dictionary.
        flags: of the scorer's dictionary.
        penalty: FixedPenalty, AdaptivePenalty, or a coefficient.
        reward_tokenizer: of a reward that is a model; by default from where the model was loaded.

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
        reward = load_reward(reward) if names_function(reward) else reward
        awaited = cls is ShapedReward and is_async(reward) and trl_awaits_objects()
        return object.__new__(_AsyncShapedReward if awaited else cls)

    def __init__(
        self,
        reward: Reward,
        scorer: FeatureScorer | None,
        flags: Iterable[Flag],
        penalty: Penalty | float,
        *,
        reward_tokenizer: Processing | None = None,
    ) -> None:
        reward = load_reward(reward) if isinstance(reward, str) else reward
        self._template: Mapping[str, Any] = {}  # of the trainer that asks
        self._inner: Callable[..., Any] = as_function(
            reward, reward_tokenizer, template=lambda: self._template
        )
        self.shaper = Shaper(scorer, flags, penalty)
        self.__name__ = reward_name(reward)
        self._deferred = DeferredMetrics()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Any:
        trainer, learning = self._begin(kwargs)
        returned = wait_for(self._call_inner(prompts, completions, kwargs))
        rewards = self._shape(
            prompts, completions, returned, learning=learning, log_extra=kwargs.get("log_extra")
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
        returned = wait_for(self._call_inner(prompts, completions, columns))
        self._shape(prompts, completions, returned, learning=True)

    def _call_inner(self, prompts: Sequence[Any], completions: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return self._inner(prompts=prompts, completions=completions, **kwargs)

    def _begin(self, kwargs: dict[str, Any]) -> tuple[Trainer | None, bool]:
        trainer = trainer_of_function(kwargs)
        learning = trainer is None or bool(trainer.model.training)
        self._template = {} if trainer is None else template_options(trainer)
        self.shaper.begin(trainer, learning=learning)
        return trainer, learning

    def _shape(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        returned: Any,
        *,
        learning: bool,
        log_extra: Callable[[str, list[Any]], None] | None = None,
    ) -> list[float | None]:
        rewards = check_rewards(returned, len(completions), self.__name__)
        scores = self.shaper.score(prompts, completions)
        penalties = self.shaper.penalties(scores, rewards, learning=learning)
        if log_extra is not None:
            for name, column in zip(self.shaper.names, scores.T.tolist(), strict=True):
                log_extra(feature_metric("shaping", name, "score"), column)
            log_extra(PENALTY, penalties.tolist())
        return [
            None if reward is None else reward - penalty
            for reward, penalty in zip(rewards, penalties.tolist(), strict=True)
        ]

    def _log(self, trainer: Trainer | None, kwargs: dict[str, Any], *, learning: bool) -> None:
        if "log_metric" in kwargs:
            for name, value in self.shaper.metrics.items():
                kwargs["log_metric"](name, value)
        elif trainer is not None and learning:
            self._deferred.add(trainer, self.shaper.metrics)


class _AsyncShapedReward(ShapedReward):
    """The shaped form of an async reward. Coefficients move before the first await, so that several async
    rewards communicate in the same order on every process."""

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Any:
        trainer, learning = self._begin(kwargs)
        returned = await self._call_inner(prompts, completions, kwargs)
        rewards = self._shape(
            prompts, completions, returned, learning=learning, log_extra=kwargs.get("log_extra")
        )
        self._log(trainer, kwargs, learning=learning)
        return rewards
