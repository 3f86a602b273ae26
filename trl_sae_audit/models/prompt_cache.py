"""Prompts that a decoder reads once, whatever follows them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .batches import pad
from .token_ids import Ids


@dataclass(frozen=True)
class Prefix:
    """Prompts that were read.

    Attributes:
        cache: their keys and values, left-padded.
        attended: [prompts, tokens], bool: which of them are real.
    """

    cache: DynamicCache
    attended: Tensor

    def select(self, prompts: Sequence[int]) -> Prefix:
        """Some of the prompts, in any order and as often as wanted, in tensors of their own."""
        chosen = torch.tensor(prompts)
        cache = copy.copy(self.cache)
        cache.layers = [
            copy.copy(layer) for layer in cache.layers
        ]  # their tensors are replaced, never written to
        cache.batch_select_indices(chosen.to(cache.layers[0].keys.device))
        return Prefix(cache, self.attended[chosen])


class PromptCache:
    """Reads prompts, and what follows them, through a decoder for which `can_continue_prompts`.

    Args:
        decoder: reads.
        run: calls the forward pass it is given, and returns what is wanted of it.
    """

    def __init__(self, decoder: Any, run: Callable[[Callable[[], object]], Any]) -> None:
        self.decoder = decoder
        self._run = run

    def prefill(self, prompts: Sequence[Ids]) -> Prefix:
        """Read prompts, none of them empty."""
        ids, attended = pad(prompts, side="left")
        cache = DynamicCache(config=self.decoder.config)
        self.extend(cache, ids, attended, (attended.cumsum(1) - 1).clamp_min(0))
        return Prefix(cache, attended)

    def extend(self, cache: DynamicCache, ids: Tensor, attended: Tensor, positions: Tensor) -> Any:
        """Read `ids` after what the cache holds, which then holds them too."""
        device = next(self.decoder.parameters()).device
        inputs = {"input_ids": ids, "attention_mask": attended.long(), "position_ids": positions}
        placed = {name: value.to(device) for name, value in inputs.items()}
        return self._run(lambda: self.decoder(**placed, past_key_values=cache, use_cache=True))


def can_continue_prompts(decoder: Any) -> bool:
    """Whether a decoder remembers a prompt as keys and values per token, within a window or without."""
    if not isinstance(decoder, PreTrainedModel) or decoder._is_stateful:
        return False
    config = decoder.config.get_text_config()
    if config.is_encoder_decoder or "chunked_attention" in (config.to_dict().get("layer_types") or ()):
        return False
    taken = inspect.signature(decoder.forward).parameters
    if not {"past_key_values", "position_ids", "attention_mask", "use_cache"} <= set(taken):
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=config).layers
    )
