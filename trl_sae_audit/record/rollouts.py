"""Answers that a model gave before and after, token by token with the features that are active there: what a reader reads side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

ROLLOUTS, TOKENS, ACTIVATIONS = "rollouts", "rollout_tokens", "rollout_activations"
"""Tables: a row an answer, a token of an answer, and an activation."""
COLUMNS = {
    ROLLOUTS: ("rollout", "when", "sampled", "prompt"),
    TOKENS: ("rollout", "text"),
    ACTIVATIONS: ("rollout", "dictionary", "place", "feature", "value"),
}
BEFORE, AFTER = "before", "after"
MOST_TOKENS = 256
"""Of an answer that are kept."""

Active = tuple[np.ndarray, np.ndarray, np.ndarray]
"""How many features are active at each token, which, and their activations."""


@dataclass(frozen=True)
class Rollout:
    """An answer.

    Attributes:
        when: "before" or "after".
        sampled: the optimizer step that was trained on it; 0 where it was sampled apart from training.
        prompt: its text.
        pieces: the answer's text, token by token.
        active: dictionary name → what is active at each of these tokens.
    """

    when: str
    sampled: int
    prompt: str
    pieces: tuple[str, ...]
    active: dict[str, Active]


def rollout_tables(rollouts: Sequence[Rollout], step: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and columns of the tables that hold some rollouts, read after `step` optimizer steps."""
    numbers = np.arange(len(rollouts))
    lengths = [len(each.pieces) for each in rollouts]
    yield (
        ROLLOUTS,
        {
            "step": np.full(len(rollouts), step),
            "rollout": numbers,
            "when": [each.when for each in rollouts],
            "sampled": np.array([each.sampled for each in rollouts], np.int64),
            "prompt": [each.prompt for each in rollouts],
        },
    )
    yield (
        TOKENS,
        {
            "step": np.full(sum(lengths), step),
            "rollout": np.repeat(numbers, lengths),
            "text": [piece for each in rollouts for piece in each.pieces],
        },
    )
    for name in dict.fromkeys(name for each in rollouts for name in each.active):
        parts = [(number, each.active[name]) for number, each in enumerate(rollouts) if name in each.active]
        sizes = [len(features) for _, (_, features, _) in parts]
        yield (
            ACTIVATIONS,
            {
                "step": np.full(sum(sizes), step),
                "rollout": np.repeat([number for number, _ in parts], sizes),
                "dictionary": [name] * sum(sizes),
                "place": np.concatenate(
                    [np.repeat(np.arange(len(counts)), counts) for _, (counts, _, _) in parts]
                ),
                "feature": np.concatenate([features for _, (_, features, _) in parts]).astype(np.int32),
                "value": np.concatenate([values for _, (_, _, values) in parts]).astype(np.float32),
            },
        )


def read_rollouts(rollouts: pd.DataFrame, tokens: pd.DataFrame, activations: pd.DataFrame) -> list[Rollout]:
    """The rollouts of the tables' latest step.

    Raises:
        ValueError: tables that do not fit each other.
    """
    if not len(rollouts):
        return []
    latest = rollouts["step"].max()
    rollouts, tokens, activations = (
        frame[frame["step"] == latest] for frame in (rollouts, tokens, activations)
    )
    texts = {number: part.tolist() for number, part in tokens.groupby("rollout")["text"]}
    known = dict(iter(activations.groupby(["rollout", "dictionary"])))
    names = activations["dictionary"].unique().tolist()
    found = []
    for row in rollouts.to_dict("records"):
        number = int(row["rollout"])
        pieces = tuple(map(str, texts.get(number, [])))
        active = {}
        for name in names:
            part = known.get((number, name), activations.iloc[:0])
            places = part["place"].to_numpy(np.int64)
            if len(places) and not (places.min() >= 0 and places.max() < len(pieces)):
                raise ValueError(f"an activation of rollout {number} is at none of its tokens")
            counts = np.bincount(places, minlength=len(pieces))
            active[name] = (counts, part["feature"].to_numpy(), part["value"].to_numpy())
        found.append(Rollout(str(row["when"]), int(row["sampled"]), str(row["prompt"]), pieces, active))
    return found
