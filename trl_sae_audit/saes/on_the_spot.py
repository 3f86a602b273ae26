"""An SAE for a model that has none: trained on the very texts that are to be looked at, and kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel

from ..models.hook_points import HookPoint, residual_width, resolve_hook_point
from ..models.residual_stream import TokenRules, residual_stream
from ..models.tokenizers import Processing, text_tokenizer
from .choice import model_depth
from .dictionary import FeatureDictionary
from .loading import load_dictionary
from .training import train_dictionary
from .training_config import TrainSAEConfig

ON_CPU, ELSEWHERE = (20_000, 100_000), (200_000, 1_000_000)
"""Tokens that are read, and those it is trained on: each several times, which costs little beside reading. On a processor what
two minutes are enough for with a model of 135M parameters; its token FVU is then 0.3 (docs/how-to/own-sae.md)."""
_TRIED = 8  # texts to see how long a token takes

logger = logging.getLogger(__name__)


def train_on_the_spot(
    model: PreTrainedModel,
    tokenizer: Processing,
    read_texts: Callable[[], Sequence[str]],
    directory: Path,
    *,
    dataset: str | None = None,
) -> FeatureDictionary:
    """The SAE in a directory, trained there first if there is none, at the middle layer with `TrainSAEConfig`'s defaults.

    The log says before it begins how long it will take. Of several processes the main one trains.

    Args:
        model: whose residual stream it explains.
        tokenizer: the model's, or a processor that has it.
        read_texts: gives the texts.
        directory: where it is kept.
        dataset: what its metadata call the texts.

    Raises:
        AuditError: as `train_dictionary`.
    """
    state = PartialState()
    with state.main_process_first():
        if directory.exists():
            if state.is_main_process:
                logger.warning("The dictionary is the one in %s, trained before.", directory)
        else:
            texts = read_texts()
            read, trained_on = ON_CPU if model.device.type == "cpu" else ELSEWHERE
            config = TrainSAEConfig(str(directory), distinct_tokens=read, training_tokens=trained_on)
            _tell(model, tokenizer, texts, config)
            trained = train_dictionary(model, tokenizer, texts, config, dataset=dataset)
            logger.warning(
                "Its token FVU on held-out texts is %.2f. It is kept: --dictionary %s in the next command.",
                *(trained.token_fvu, directory),
            )
    return load_dictionary(directory)


def _tell(
    model: PreTrainedModel, tokenizer: Processing, texts: Sequence[str], config: TrainSAEConfig
) -> None:
    depth = model_depth(model)
    hook = resolve_hook_point(model, str((depth - 1) // 2))
    width = residual_width(model)
    d_sae, _ = config.size(width)
    read = config.distinct_tokens or config.training_tokens
    seconds = read * _seconds_a_token(model, tokenizer, texts, hook)
    below = sum(parameter.numel() for parameter in hook.module.parameters()) * ((depth - 1) // 2 + 1)
    # encoder and decoder, forward and backward, beside a forward pass
    seconds *= 1 + config.training_tokens / read * 6 * width * d_sae / max(1, below)
    span = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(1, round(seconds))} s"
    logger.warning(
        "An SAE is trained on these texts first: %s features at %s, at most %s of their tokens; about %s.",
        *(f"{d_sae:,}", hook.path, f"{read:,}", span),
    )


def _seconds_a_token(
    model: PreTrainedModel, tokenizer: Processing, texts: Sequence[str], hook: HookPoint
) -> float:
    reader = text_tokenizer(tokenizer, hook.decoder)
    tried = texts[:: max(1, len(texts) // _TRIED)][:_TRIED]
    list(residual_stream(model, reader, tried[:1], hook, TokenRules()))  # the first pass makes buffers
    begun = time.perf_counter()
    tokens = sum(len(part) for part in residual_stream(model, reader, tried, hook, TokenRules()))
    return (time.perf_counter() - begun) / max(1, tokens)
