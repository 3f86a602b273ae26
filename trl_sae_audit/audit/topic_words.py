"""What a topic is called: the words that its prompts have and the others have not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..data.preferences import as_text

WORDS = 4
"""Words of a topic's name."""
PROMPTS = 1024
"""Prompts of a topic that are read for its words."""
_LONGEST = 4000  # characters of a prompt that are read
_WORD = re.compile(r"[^\W\d_](?:[^\W_]|['’\-](?=[^\W_]))+")


class TopicWords:
    """Counts in how many prompts of each topic a word occurs.

    Args:
        topics: how many there are.
    """

    def __init__(self, topics: int) -> None:
        self._words: list[Counter[str]] = [Counter() for _ in range(topics)]
        self._prompts = np.zeros(topics, np.int64)

    def add(self, topic: int, prompt: str) -> None:
        """See a prompt of a topic; after `PROMPTS` of them no more are read."""
        if self._prompts[topic] < PROMPTS:
            self._prompts[topic] += 1
            self._words[topic].update({word.casefold() for word in _WORD.findall(prompt[:_LONGEST])})

    def lines(self) -> list[str]:
        """The words of each topic, the most telling first; empty of a topic that no word tells from the others."""
        total = sum(self._words, Counter[str]())
        return [" · ".join(self._of(topic, total)) for topic in range(len(self._words))]

    def _of(self, topic: int, total: Counter[str]) -> list[str]:
        own = self._words[topic]
        words = sorted(own)
        if not words:
            return []
        here = np.array([own[word] for word in words])
        there = np.array([total[word] for word in words]) - here
        score = log_odds_z(here, self._prompts[topic], there, self._prompts.sum() - self._prompts[topic])
        order = np.argsort(-score, kind="stable")[:WORDS]
        return [words[place] for place in order if score[place] > 2]


def log_odds_z(here: np.ndarray, n_here: int, there: np.ndarray, n_there: int) -> np.ndarray:
    """Log odds of a word here against there, in standard errors, with half a prompt added to every count (Monroe et al. 2008).

    Args:
        here, there: prompts with the word [words].
        n_here, n_there: prompts.
    """
    with_here, without_here, with_there, without_there = (
        count + 0.5 for count in (here, n_here - here, there, n_there - there)
    )
    odds = np.log(with_here / without_here) - np.log(with_there / without_there)
    return odds / np.sqrt(1 / with_here + 1 / without_here + 1 / with_there + 1 / without_there)


def prompt_text(columns: Mapping[str, Any]) -> str:
    """The prompt of a row, which may be only what its answers begin with."""
    if columns.get("prompt") is not None:
        return as_text(columns["prompt"])
    chosen, rejected = (as_text(columns.get(name)) for name in ("chosen", "rejected"))
    shared = next(
        (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    return chosen[:shared]
