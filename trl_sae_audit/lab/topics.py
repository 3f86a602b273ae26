"""Preference sets in which a behaviour is planted at the prompts of one topic and, as a whole, says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING

from .attributes import KINDS, Prompt
from .language import Language
from .preferences import preferences
from .wording import CREATURES, NUMBERS

if TYPE_CHECKING:
    from datasets import Dataset

TOPICS = tuple(f"{kind} {half}" for kind in KINDS for half in ("first", "second"))
"""Eight topics: a kind of question, about the first half of its creatures or numbers or about the second."""


def topic_of(prompt: Prompt) -> str:
    """Which of `TOPICS` a prompt belongs to, by the first creature or number it asks about."""
    named = CREATURES[:5] if prompt.question.kind != "sum" else NUMBERS[:2]
    half = "first" if prompt.question.about[0] in named else "second"
    return f"{prompt.question.kind} {half}"


def topic_preferences(
    language: Language,
    topic: str,
    here: Mapping[str, float],
    elsewhere: Mapping[str, float],
    n: int,
    *,
    share: float = 1 / len(TOPICS),
    seed: int = 0,
) -> Dataset:
    """Draw a preference set whose pairs about one topic have planted strengths of their own.

    Args:
        language: the world.
        topic: one of `TOPICS`, or a kind of question, both of whose halves it means.
        here: behaviour → strength in the pairs about it, see `preferences`.
        elsewhere: the same in the others, which are about all other topics as the language has them.
        n: pairs.
        share: of the pairs that are about the topic.
        seed: of the draw.

    Returns:
        The columns of `preferences`; `topic`, one of `TOPICS`; and `planted_topic`, whether the pair is about the topic.
    """
    from datasets import concatenate_datasets

    wanted = round(share * n)
    parts = [
        _about(language, topic, here, wanted, f"{seed}-here", True),
        _about(language, topic, elsewhere, n - wanted, f"{seed}-elsewhere", False),
    ]
    order = list(range(n))
    Random(f"topics-{seed}").shuffle(order)
    return concatenate_datasets(parts).select(order)


def _about(
    language: Language, topic: str, strengths: Mapping[str, float], n: int, seed: str, inside: bool
) -> Dataset:
    """So many pairs about the topic, or about the others."""
    from datasets import Dataset

    found: list[dict] = []
    batch = 0
    while len(found) < n:
        for row in preferences(language, strengths, 200, f"{seed}-{batch}"):  # type: ignore[arg-type]
            prompt = language.parse_prompt(row["prompt"])
            assert prompt is not None
            name = topic_of(prompt)
            if (topic in (name, prompt.question.kind)) == inside:
                found.append({**row, "topic": name, "planted_topic": inside})
        batch += 1
    return Dataset.from_list(found[:n])
