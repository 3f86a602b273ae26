"""Hidden states of responses after their prompts; a prompt that several responses follow is read once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import batched, pad
from .hook_points import HookPoint
from .prompt_cache import Prefix, PromptCache, can_continue_prompts
from .residual_stream import evaluation_mode, run_until
from .token_ids import Ids

logger = logging.getLogger(__name__)

Row = tuple[Ids, Ids]
"""A prompt's token ids and those of the response after it."""


@dataclass(frozen=True)
class ResponseStates:
    """One forward pass.

    Attributes:
        rows: which of the rows asked for, in order.
        ids: [rows, tokens], right-padded: whole rows, or the responses alone.
        hidden: [rows, tokens, d_model] at the hook point.
        of_response: [rows, tokens], bool: the response's tokens; a row's first only where it was asked for.
    """

    rows: list[int]
    ids: Tensor
    hidden: Tensor
    of_response: Tensor


class PrefixCachedReader:
    """Reads responses at a hook point, in batches of similar length.

    Where rows share a prompt, as the answers of a group do, the model reads each distinct prompt once and its responses
    after copies of the prompt's keys and values: exact to rounding. Models that remember a prompt in another way than keys and values
    per token, and those that the first such batch shows to read differently, are given whole rows.

    Args:
        point: where to read; nothing above it is computed.
        batch_size: rows per forward pass.
        max_length: tokens of a row; longer ones lose their beginning.
    """

    def __init__(self, point: HookPoint, batch_size: int, max_length: int) -> None:
        self.point = point
        self.batch_size = batch_size
        self.max_length = max_length
        self._caches = can_continue_prompts(point.decoder)
        self._prompts = PromptCache(point.decoder, lambda forward: run_until(point, forward))
        self._checked = False
        self._skipped = 1

    @torch.no_grad()
    def read(self, rows: Sequence[Row], *, first: bool = False) -> Iterator[ResponseStates]:
        """Every row once, in an order of the reader's own; until the last the decoder is in evaluation mode.

        Args:
            rows: prompts and responses.
            first: whether the first token of a row counts, if its prompt is empty.
        """
        self._skipped = 0 if first else 1
        with evaluation_mode(self.point.decoder):
            yield from self._read(rows)

    def _read(self, rows: Sequence[Row]) -> Iterator[ResponseStates]:
        followers = Counter(prompt for prompt, _ in rows)
        shared: list[int] = []
        alone: list[int] = []
        for index, (prompt, response) in enumerate(rows):
            fits = prompt and response and len(prompt) + len(response) <= self.max_length
            (shared if fits and followers[prompt] > 1 else alone).append(index)
        if shared and self._caches and not self._checked:
            self._check_cache([rows[index] for index in shared])
        if not self._caches:
            shared, alone = [], list(range(len(rows)))
        alone.sort(key=lambda index: len(rows[index][0]) + len(rows[index][1]))
        for part in batched(alone, self.batch_size):
            yield self._read_whole(rows, part)
        prompts = sorted({rows[index][0] for index in shared}, key=len)
        for some in batched(prompts, self.batch_size):
            place = {prompt: index for index, prompt in enumerate(some)}
            prefix = self._prompts.prefill(some)
            answering = [index for index in shared if rows[index][0] in place]
            answering.sort(key=lambda index: len(rows[index][1]))
            for part in batched(answering, self.batch_size):
                yield self._continue(prefix, [place[rows[index][0]] for index in part], rows, part)

    def _read_whole(self, rows: Sequence[Row], part: Sequence[int]) -> ResponseStates:
        cut = [(rows[index][0] + rows[index][1])[-self.max_length :] or (0,) for index in part]
        ids, attended = pad(cut)
        lengths = attended.sum(1, keepdim=True)
        responses = torch.tensor([len(rows[index][1]) for index in part])[:, None]
        place = torch.arange(ids.shape[1])
        of_response = (place >= (lengths - responses).clamp_min(self._skipped)) & attended
        hidden = self._run(input_ids=ids, attention_mask=attended.long(), use_cache=False)
        return ResponseStates(list(part), ids, hidden, of_response)

    def _continue(
        self, prefix: Prefix, prompts: list[int], rows: Sequence[Row], part: Sequence[int]
    ) -> ResponseStates:
        """Read the responses of `part`, each after its row of the prefix."""
        ids, of_response = pad([rows[index][1] for index in part])
        chosen = prefix.select(prompts)
        positions = chosen.attended.sum(1, keepdim=True) + torch.arange(ids.shape[1])
        attended = torch.cat([chosen.attended, of_response], 1)
        hidden = self._prompts.extend(chosen.cache, ids, attended, positions)
        return ResponseStates(list(part), ids, hidden, of_response)

    def _run(self, **inputs: Any) -> Tensor:
        placed = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        return run_until(self.point, lambda: self.point.decoder(**placed))

    def _check_cache(self, rows: Sequence[Row]) -> None:
        """Read the row of the shortest prompt and the longest row both ways; if they differ, share no prompts."""
        self._checked = True
        pair = [min(rows, key=lambda row: len(row[0])), max(rows, key=lambda row: len(row[0]) + len(row[1]))]
        after = self._continue(self._prompts.prefill([prompt for prompt, _ in pair]), [0, 1], pair, [0, 1])
        whole = self._read_whole(pair, [0, 1])
        one, other = after.hidden[after.of_response].float(), whole.hidden[whole.of_response].float()
        self._caches = bool((one - other).norm() <= torch.finfo(after.hidden.dtype).eps ** 0.5 * other.norm())
        if not self._caches:
            logger.info(
                "%s reads a response differently after its prompt's keys and values; prompts are read once a response.",
                type(self.point.decoder).__name__,
            )

    @property
    def _device(self) -> torch.device:
        return next(self.point.decoder.parameters()).device
