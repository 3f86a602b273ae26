"""How many tokens of an optimizer step are encoded: few enough that they hardly slow the training, whatever the dictionary."""

from __future__ import annotations

import dataclasses

from transformers import Trainer
from transformers.trainer_pt_utils import get_model_param_count

from ..trainers.kinds import policy_of
from .config import AttributionConfig

MOST, FEWEST = 1024, 16
SHARE = 0.02
"""Of the step's operations that encoding may take, where that leaves `FEWEST` tokens."""
_ROW = 128  # tokens of a row, assumed
_PASSES = 8  # operations of a step for each parameter and token: forward, backward, a reference
_PRODUCTS = 3  # with a dictionary, of a token: encoded for selection; encoded and projected for token scores


def with_token_budget(config: AttributionConfig, trainer: Trainer) -> AttributionConfig:
    """The configuration with the number of tokens, where the user leaves it to us: the same whenever the run is resumed."""
    if config.selection_tokens is not None:
        return config
    args = trainer.args
    rows = max(1, args.per_device_train_batch_size * args.gradient_accumulation_steps)
    parameters = get_model_param_count(policy_of(trainer))  # whole, where ZeRO-3 keeps a part of each here
    step = _PASSES * parameters * rows * _ROW
    size = sum(dictionary.d_sae * dictionary.d_model for dictionary in config.dictionaries)
    products = 2 * size * (_PRODUCTS if config.token_scores else 1)
    tokens = min(MOST, max(FEWEST, int(SHARE * step / products)))
    return dataclasses.replace(config, selection_tokens=tokens)
