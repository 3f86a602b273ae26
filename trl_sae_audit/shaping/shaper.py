"""r' = r − penalty: what every shaped reward does, whichever way a trainer asks for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..errors import AuditError
from ..flags import Flag, FlagSet, distinct_names
from ..metric_names import PENALTY, PENALTY_SHARE, SHAPED_REWARD, feature_metric
from ..trainers.rollout import is_trained
from .adaptive import AdaptivePenalty
from .penalties import FixedPenalty, Penalty
from .scorer import FeatureScorer

logger = logging.getLogger(__name__)


class Shaper:
    """Scores responses, asks the penalty what they cost, and keeps what a log should show.

    Args:
        scorer: frozen model and dictionary; None only without flags.
        flags: whose features cost; none of them changes no reward.
        penalty: who sets the coefficients, or a number.

    Raises:
        AuditError: flags of another dictionary; flags without a scorer; a target in z-scores and no calibration.
    """

    def __init__(self, scorer: FeatureScorer | None, flags: Iterable[Flag], penalty: Penalty | float) -> None:
        self.scorer = scorer
        self.flags = FlagSet(flags)
        self.penalty = as_penalty(penalty)
        self.metrics: dict[str, float] = {}
        if len(self.flags) and scorer is None:
            raise AuditError(
                "There are flags but no scorer to score them; pass scorer=FeatureScorer(model, …)."
            )
        own = self.flags.of(scorer.dictionary) if scorer is not None and len(self.flags) else []
        if scorer is not None and len(own) < len(self.flags):
            others = sorted({flag.dictionary for flag in self.flags} - {scorer.dictionary.name})
            raise AuditError(
                f"Some flags are of {', '.join(map(repr, others))}, but the scorer scores {scorer.dictionary.name!r}; "
                "pass only the flags of that dictionary."
            )
        self.features = [flag.feature for flag in own]
        self.names = distinct_names(own)
        self.penalty.bind(own)
        self._check_calibration()
        self._trainers_seen: set[int] = set()

    def score(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Tensor:
        """Signed scores [n, flags] of texts: positive is what the flags object to."""
        if self.scorer is None or not self.features:
            return torch.zeros(len(responses), 0, dtype=torch.float32)
        return self.apply_directions(self.scorer.score(prompts, responses, self.features))

    def score_ids(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """The same of token ids of the scorer's tokenizer."""
        if self.scorer is None or not self.features:
            return torch.zeros(len(responses), 0, dtype=torch.float32)
        return self.apply_directions(self.scorer.score_ids(prompts, responses, self.features))

    def apply_directions(self, scores: Tensor) -> Tensor:
        """Scores [n, flags] turned by each flag's direction: up s, down −s, both |s|."""
        columns = [flag.signed(scores[:, index]) for index, flag in enumerate(self.flags)]
        return torch.stack(columns, 1) if columns else scores

    def begin(self, trainer: Trainer | None, *, learning: bool) -> None:
        """A batch of rewards is requested.

        Raises:
            AuditError: if the scorer reads the very model that is being trained.
        """
        if trainer is not None and id(trainer) not in self._trainers_seen:
            self._trainers_seen.add(id(trainer))
            self._check_trainer(trainer)
        if learning:
            self.penalty.begin_batch()

    def penalties(self, scores: Tensor, rewards: Sequence[float | None], *, learning: bool) -> Tensor:
        """What to subtract from each reward [n], float64; the batch is noted for the next coefficients if `learning`.

        Args:
            scores: signed, [n, flags].
            rewards: the inner ones; None where the function does not judge.
        """
        penalties = self.penalty(scores)
        judged = [index for index, reward in enumerate(rewards) if reward is not None]
        values = torch.tensor([rewards[index] for index in judged], dtype=torch.float64)
        if learning:
            self.penalty.end_batch(scores[judged], values)
        self.metrics = self._describe(scores[judged], values, penalties[judged])
        return penalties

    def _describe(self, scores: Tensor, rewards: Tensor, penalties: Tensor) -> dict[str, float]:
        """`shaping/reward` inner, `/penalty` subtracted, `/penalty_share` its spread relative to the reward's, and each
        flag's `/score` (signed) and `/coefficient` (what one score unit costs)."""
        if not len(rewards):
            return {}
        spread = self.penalty.spread or float(rewards.std(unbiased=False))
        metrics = {
            SHAPED_REWARD: float(rewards.mean()),
            PENALTY: float(penalties.mean()),
        }
        if spread > 0:
            metrics[PENALTY_SHARE] = float(penalties.std(unbiased=False)) / spread
        for index, (name, coefficient) in enumerate(
            zip(self.names, self.penalty.coefficients(), strict=True)
        ):
            metrics[feature_metric("shaping", name, "score")] = float(scores[:, index].double().mean())
            metrics[feature_metric("shaping", name, "coefficient")] = coefficient
        return metrics

    def _check_calibration(self) -> None:
        adaptive = isinstance(self.penalty, AdaptivePenalty)
        if adaptive and self.features and self.scorer is not None and not self.scorer.calibrated:
            raise AuditError(
                "AdaptivePenalty reads z-scores, but the scorer is not calibrated; call scorer.calibrate(pairs) with "
                "responses of the reference model first."
            )

    def _check_trainer(self, trainer: Trainer) -> None:
        if self.scorer is not None and is_trained(self.scorer.model, trainer):
            raise AuditError(
                "The scorer reads the model that is being trained, which would learn to hide the feature instead of "
                "dropping the behaviour; give FeatureScorer a frozen copy, the reference model say."
            )
        if trainer.state.global_step > 0 and self.penalty.batches == 0:
            logger.warning(
                "The run resumes at step %d, but the penalty starts from the beginning; pass callbacks=[ShapingCallback(…)] to have "
                "its coefficients saved and restored with checkpoints.",
                trainer.state.global_step,
            )


def as_penalty(penalty: Penalty | float) -> Penalty:
    """A number is a FixedPenalty of that coefficient."""
    if isinstance(penalty, Penalty):
        return penalty
    if isinstance(penalty, (int, float)) and not isinstance(penalty, bool):
        return FixedPenalty(float(penalty))
    raise AuditError(
        f"The penalty is a {type(penalty).__name__}; pass FixedPenalty(…), AdaptivePenalty(…) or a coefficient."
    )


def penalty_from_settings(kind: str, settings: Mapping[str, Any]) -> Penalty:
    """The penalty of that kind and those settings.

    Raises:
        AuditError: a kind that is not known.
    """
    kinds: dict[str, type[FixedPenalty] | type[AdaptivePenalty]] = {
        "FixedPenalty": FixedPenalty,
        "AdaptivePenalty": AdaptivePenalty,
    }
    if kind not in kinds:
        raise AuditError(f"The saved penalty is a {kind!r}, which this version does not know; pass penalty=.")
    return kinds[kind](**settings)
