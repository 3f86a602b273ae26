"""Contexts of a run's features: out of the trackers' reservoirs, decoded, into the run record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, Trainer

from ..attribution.contexts import ResponseWindow
from ..attribution.feature_tracker import FeatureTracker
from ..models.tokenizers import Processing, inner_tokenizer
from ..record.contexts import CONTEXTS
from ..saes.contexts import Window, decode, decode_windows

RESPONSE = "response"


class ContextWriter:
    """Puts what is new among the strongest places on the record, at logs 1, 2, 4, 8 …, at checkpoints and at the end.

    The rows of all times and processes together hold each feature's strongest places, so a resumed run has nothing to restore.

    Args:
        trainer: whose `train` is running.
        trackers: of its dictionaries.
        append: adds rows to the record's tables; None on processes that have no record.
        sides: names of the rows of a batch's first and second half, where these are pairs.
    """

    def __init__(
        self,
        trainer: Trainer,
        trackers: Sequence[FeatureTracker],
        append: Callable[[str, Mapping[str, Any]], None] | None,
        sides: tuple[str, str] | None,
    ) -> None:
        self._trainer = trainer
        self._trackers = [tracker for tracker in trackers if tracker.contexts is not None]
        self._append = append
        self._sides = sides
        self._logs = 0

    def on_log(self, step: int) -> bool:
        """A log is made, on every process alike; whether it is one at which places are written."""
        self._logs += 1
        if self._logs & (self._logs - 1) == 0:
            self.write(step)
            return True
        for tracker in self._trackers:
            if tracker.contexts is not None and tracker.contexts.is_full:
                tracker.contexts.settle()
        return False

    def write(self, step: int) -> None:
        """Put what is new up to a step on the record; every process is to call it."""
        if not self._trackers:
            return
        if not isinstance(self._trainer.processing_class, Processing):
            return  # a trainer without texts
        tokenizer = inner_tokenizer(self._trainer.processing_class)
        parts = [part for tracker in self._trackers if (part := self._columns(tracker, tokenizer, step))]
        if self._trainer.accelerator.num_processes > 1:
            parts = gather_object(parts)
        if self._append is not None:
            for part in parts:
                self._append(CONTEXTS, part)

    def _columns(
        self, tracker: FeatureTracker, tokenizer: PreTrainedTokenizerBase, step: int
    ) -> dict[str, Any] | None:
        assert tracker.contexts is not None
        places, windows = tracker.contexts.take()
        if not len(places):
            return None
        numbers = {number: place for place, number in enumerate(windows)}
        which = np.array([numbers[number] for number in places.text.tolist()])
        shown = list(windows.values())
        texts = decode_windows(tokenizer, [Window(tuple(each.tokens), each.place) for each in shown])
        prompts = decode(tokenizer, [_without(tokenizer.pad_token_id, each.prompt) for each in shown])
        before, at, after = (np.array(part, object)[which] for part in zip(*texts, strict=True))
        return {
            "step": np.full(len(places), step),
            "dictionary": [tracker.dictionary.name] * len(places),
            "feature": places.feature.astype(np.int64),
            "source": np.array([self._source(each) for each in shown], object)[which],
            "activation": places.activation.astype(np.float64),
            "prompt": np.array(prompts, object)[which],
            **{"before": before, "at": at, "after": after},
        }

    def _source(self, window: ResponseWindow) -> str:
        if self._sides is None:
            return RESPONSE
        return self._sides[0] if 2 * window.row < window.rows else self._sides[1]


def _without(padding: int | None, tokens: Sequence[int]) -> list[int]:
    """Tokens without the padding at their beginning."""
    kept = list(tokens)
    while kept and kept[0] == padding:
        kept.pop(0)
    return kept
