"""Whether, and how, a dictionary's selection is computed in a run."""

from __future__ import annotations

import logging

from transformers import Trainer

from ..attribution.observers import SelectionObserver, TokenScoreObserver
from ..errors import AuditError
from ..models.hook_points import HookPoint
from ..models.language_head import LanguageHead
from ..saes.dictionary import FeatureDictionary
from ..trainers.engines import has_whole_head
from ..trainers.kinds import policy_of, trainer_kind
from ..trainers.response_outputs import temperature_of
from .config import AttributionConfig

logger = logging.getLogger(__name__)


def make_selection(
    config: AttributionConfig, trainer: Trainer, dictionary: FeatureDictionary, point: HookPoint
) -> SelectionObserver | None:
    """What looks at response tokens for a dictionary on the trainer's device; None where selection is not to be computed."""
    if not config.selection or dictionary.encoder is None:
        return None
    if dictionary.decoder.device.type != dictionary.device.type:
        logger.warning(
            "Selection encodes tokens at every step, and the offloaded dictionary %r would go to the GPU each time: it is left "
            "out. Do not offload to have it.",
            dictionary.name,
        )
        return None
    return SelectionObserver(
        dictionary,
        _of_a_forward(config, trainer),
        _head(trainer, point),
        _seed(config, trainer, dictionary),
        contexts=config.contexts,
        attention_sinks=config.attention_sinks,
    )


def make_token_scores(
    config: AttributionConfig, trainer: Trainer, dictionary: FeatureDictionary
) -> TokenScoreObserver | None:
    """What computes token scores for a dictionary on the trainer's device; None where they are not asked for."""
    if not config.token_scores:
        return None
    return TokenScoreObserver(
        dictionary,
        _of_a_forward(config, trainer),
        (*_seed(config, trainer, dictionary), 1),
        attention_sinks=config.attention_sinks,
    )


def _of_a_forward(config: AttributionConfig, trainer: Trainer) -> int:
    assert config.selection_tokens is not None
    return -(-config.selection_tokens // max(1, trainer.args.gradient_accumulation_steps))


def _seed(config: AttributionConfig, trainer: Trainer, dictionary: FeatureDictionary) -> tuple[int, ...]:
    position = [one.name for one in config.dictionaries].index(dictionary.name)
    return trainer.args.seed, trainer.accelerator.process_index, position


def _head(trainer: Trainer, point: HookPoint) -> LanguageHead | None:
    """The head, for weights from the last hidden state; None if there is none, or not all of it in one process."""
    if trainer_kind(trainer) == "RewardTrainer" or not has_whole_head(trainer):
        return None
    try:
        return LanguageHead(policy_of(trainer), point.decoder, temperature_of(trainer))
    except AuditError:  # a classifier, or virtual tokens: where no weights are found the log says so
        return None
