"""Hidden states of responses after their prompts; a prompt that several responses follow is read once."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .hook_points import HookPoint
from .residual_stream import evaluation_mode, stopped_at
from .tokenized import Ids

logger = logging.getLogger(__name__)

Row = tuple[Ids, Ids]
"""A prompt's token ids and those of the response after it."""


@dataclass(frozen=True)
class Reading:
    """One forward pass.

    Attributes:
        rows: which of the rows asked for, in order.
        ids: [rows, tokens], right-padded: whole rows, or the responses alone.
        hidden: [rows, tokens, d_model] at the hook point.
        of_response: [rows, tokens], bool: the response's tokens, but never a row's first.
    """

    rows: list[int]
    ids: Tensor
    hidden: Tensor
    of_response: Tensor


class ResponseReader:
    """Reads responses at a hook point, in batches of similar length.

    Where rows share a prompt, as the answers of a group do, the model reads each distinct prompt once and its responses
    after copies of the prompt's keys and values: exact to rounding. Models whose memory of a prompt is not keys and values
    per token, and those that the first such batch shows to read otherwise, are given whole rows.

    Args:
        point: where to read; nothing above it is computed.
        batch_size: rows per forward pass.
        max_length: tokens of a row; longer ones lose their beginning.
    """

    def __init__(self, point: HookPoint, batch_size: int, max_length: int) -> None:
        self.point = point
        self.batch_size = batch_size
        self.max_length = max_length
        self._shares = can_continue_prompts(point.decoder)
        self._compared = False

    @torch.no_grad()
    def read(self, rows: Sequence[Row]) -> Iterator[Reading]:
        """Every row once, in an order of the reader's own; until the last the decoder is in evaluation mode."""
        with evaluation_mode(self.point.decoder):
            yield from self._read(rows)

    def _read(self, rows: Sequence[Row]) -> Iterator[Reading]:
        followers = Counter(prompt for prompt, _ in rows)
        shared: list[int] = []
        alone: list[int] = []
        for index, (prompt, response) in enumerate(rows):
            fits = prompt and response and len(prompt) + len(response) <= self.max_length
            (shared if fits and followers[prompt] > 1 else alone).append(index)
        if shared and self._shares and not self._compared:
            self._compare([rows[index] for index in shared])
        if not self._shares:
            shared, alone = [], list(range(len(rows)))
        alone.sort(key=lambda index: len(rows[index][0]) + len(rows[index][1]))
        for part in _batches(alone, self.batch_size):
            yield self._whole(rows, part)
        prompts = sorted({rows[index][0] for index in shared}, key=len)
        for some in _batches(prompts, self.batch_size):
            place = {prompt: index for index, prompt in enumerate(some)}
            memory = self._memory_of(some)
            after = sorted(
                (index for index in shared if rows[index][0] in place), key=lambda index: len(rows[index][1])
            )
            for part in _batches(after, self.batch_size):
                yield self._after(memory, [place[rows[index][0]] for index in part], rows, part)

    def _whole(self, rows: Sequence[Row], part: list[int]) -> Reading:
        cut = [(rows[index][0] + rows[index][1])[-self.max_length :] or (0,) for index in part]
        ids, attended = _right_padded(cut)
        lengths = attended.sum(1, keepdim=True)
        responses = torch.tensor([len(rows[index][1]) for index in part])[:, None]
        place = torch.arange(ids.shape[1])
        of_response = (place >= (lengths - responses).clamp_min(1)) & attended
        hidden = self._run(input_ids=ids, attention_mask=attended.long(), use_cache=False)
        return Reading(part, ids, hidden, of_response)

    def _memory_of(self, prompts: Sequence[Ids]) -> tuple[Any, Tensor]:
        """Keys and values of the prompts, left-padded, and which of them are real: [prompts, tokens]."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts])
        attended = torch.arange(longest) >= longest - torch.tensor([[len(prompt)] for prompt in prompts])
        memory = DynamicCache(config=self.point.decoder.config)
        self._go_on(memory, ids, attended, (attended.cumsum(1) - 1).clamp_min(0))
        return memory, attended

    def _after(
        self, memory: tuple[Any, Tensor], prompts: list[int], rows: Sequence[Row], part: list[int]
    ) -> Reading:
        ids, of_response = _right_padded([rows[index][1] for index in part])
        chosen = torch.tensor(prompts)
        before = memory[1][chosen]
        own = copy.copy(memory[0])
        own.layers = [
            copy.copy(layer) for layer in own.layers
        ]  # their tensors are replaced, never written to
        own.batch_select_indices(chosen.to(self._device))
        positions = before.sum(1, keepdim=True) + torch.arange(ids.shape[1])
        hidden = self._go_on(own, ids, torch.cat([before, of_response], 1), positions)
        return Reading(part, ids, hidden, of_response)

    def _go_on(self, memory: Any, ids: Tensor, attended: Tensor, positions: Tensor) -> Tensor:
        placed = {"input_ids": ids, "attention_mask": attended.long(), "position_ids": positions}
        return self._run(**placed, past_key_values=memory, use_cache=True)

    def _run(self, **inputs: Any) -> Tensor:
        placed = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        return stopped_at(self.point, lambda: self.point.decoder(**placed))

    def _compare(self, rows: Sequence[Row]) -> None:
        """Read the row of the shortest prompt and the longest row both ways; if they differ, share no prompts."""
        self._compared = True
        pair = [min(rows, key=lambda row: len(row[0])), max(rows, key=lambda row: len(row[0]) + len(row[1]))]
        after = self._after(self._memory_of([prompt for prompt, _ in pair]), [0, 1], pair, [0, 1])
        whole = self._whole(pair, [0, 1])
        one, other = after.hidden[after.of_response].float(), whole.hidden[whole.of_response].float()
        self._shares = bool((one - other).norm() <= torch.finfo(after.hidden.dtype).eps ** 0.5 * other.norm())
        if not self._shares:
            logger.info(
                "%s reads a response otherwise after its prompt's keys and values; prompts are read once a response.",
                type(self.point.decoder).__name__,
            )

    @property
    def _device(self) -> torch.device:
        return next(self.point.decoder.parameters()).device


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


def _right_padded(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids, padded with 0, and which of them are real: both [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
