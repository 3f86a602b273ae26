"""Some of the answers that an on-policy run trains on, of its first and of its latest steps, for the reader in the report.

Both are read by the model as it is when they are written, so that what differs between them is what was written and not who reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer

from ..attribution.feature_tracker import FeatureTracker
from ..record.rollouts import AFTER, BEFORE, MOST_TOKENS, Rollout, rollout_tables
from ..saes.contexts import decode, decode_pieces
from .generation_prompts import tokenizer_of
from .sampled_answers import answer_activations

KEPT = 16
"""Answers of the first steps, and as many of the latest."""
_MICROBATCHES = 8
"""The first and the latest so many micro-batches are kept until they are written: their token ids, on the device."""
_LONGEST_PROMPT = 400

_Seen = tuple[int, Tensor, Tensor]
"""The optimizer step, token ids of a micro-batch, and which of them are a response's."""


class RolloutKeeper:
    """Keeps answers of the first and of the latest micro-batches; for the main process.

    A run that resumes begins anew with its first ones.

    Args:
        trainer: whose `train` is running.
        trackers: of its dictionaries.
        append: adds rows to the record's tables.
        attention_sinks: count features as active at attention sinks too.
    """

    def __init__(
        self,
        trainer: Trainer,
        trackers: Sequence[FeatureTracker],
        append: Callable[[str, Mapping[str, Any]], None],
        *,
        attention_sinks: bool = False,
    ) -> None:
        self._attention_sinks = attention_sinks
        self._trainer = trainer
        self._trackers = [tracker for tracker in trackers if tracker.selects]
        self._append = append
        self._first: list[_Seen] = []
        self._latest: deque[_Seen] = deque(maxlen=_MICROBATCHES)
        self._written = -1

    def add(self, step: int, ids: Tensor, counted: Tensor) -> None:
        """A micro-batch of the optimizer step that is next: token ids, and which of them are a response's, [rows, tokens] both."""
        seen = (step, ids.detach(), counted.detach())
        if len(self._first) < _MICROBATCHES:
            self._first.append(seen)
        self._latest.append(seen)

    def write(self, step: int) -> None:
        """Read what is kept, and put it on the record, once a step."""
        tokenizer = tokenizer_of(self._trainer)
        if step == self._written or not self._first or not isinstance(tokenizer, PreTrainedTokenizerBase):
            return
        self._written = step
        pad = tokenizer.pad_token_id
        first = _choose(self._first, pad, reversed_order=False)
        known = {(at, prompt, answer) for at, prompt, answer in first}
        latest = [row for row in _choose(list(self._latest), pad, reversed_order=True, preferred={prompt for _, prompt, _ in first}) if row not in known]  # fmt: skip
        if not latest:
            return
        rows = [(BEFORE, *row) for row in first] + [(AFTER, *row) for row in latest]
        asked = [(prompt, answer) for _, _, prompt, answer in rows]
        active = {
            tracker.dictionary.name: answer_activations(
                tracker.point, tracker.dictionary, asked, attention_sinks=self._attention_sinks
            )
            for tracker in self._trackers
        }
        prompts = decode(tokenizer, [prompt for prompt, _ in asked])
        found = [
            Rollout(
                when,
                at,
                prompts[place][-_LONGEST_PROMPT:],
                tuple(decode_pieces(tokenizer, answer)),
                {name: parts[place] for name, parts in active.items()},
            )
            for place, (when, at, _, answer) in enumerate(rows)
        ]
        for table, columns in rollout_tables(found, step):
            self._append(table, columns)


_Row = tuple[int, tuple[int, ...], tuple[int, ...]]
"""The optimizer step, and the token ids of prompt and answer."""


def _choose(
    seen: Sequence[_Seen],
    pad: int | None,
    *,
    reversed_order: bool,
    preferred: set[tuple[int, ...]] | None = None,
) -> list[_Row]:
    """One answer to each prompt, `KEPT` at most: of preferred prompts before the others, then the earliest or the latest."""
    order = list(reversed(seen)) if reversed_order else list(seen)
    found: dict[tuple[int, ...], _Row] = {}
    for step, ids, counted in order:
        for tokens, own in zip(ids.tolist(), counted.bool().tolist(), strict=True):
            if not any(own):
                continue
            begin = own.index(True)
            prompt = list(tokens[:begin])
            while prompt and prompt[0] == pad:
                prompt.pop(0)
            answer = tuple(token for token, is_own in zip(tokens, own, strict=True) if is_own)[:MOST_TOKENS]
            if prompt:
                found.setdefault(tuple(prompt), (step, tuple(prompt), answer))
    rows = sorted(found.values(), key=lambda row: row[1] not in (preferred or set()))
    return rows[:KEPT]
