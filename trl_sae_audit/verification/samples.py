"""Answers before and after at the same prompts, of the prompts where they differ most: for a reader, side by side.

What differs is measured in a few features f, flagged ones and those that rose (see `choose_features`). Of prompt u

    change_u = Σ_f (ā_fu(after) − ā_fu(before)) / max_u' ā_fu'

with ā_fu the mean activation over the tokens of the answers to it and the largest over all prompts, before and after. The prompts
with the largest |change_u| are kept, and of the answers to each the pair that differs most in the same units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..models.tokenizers import Processing, inner_tokenizer
from ..record.rollouts import AFTER, BEFORE, MOST_TOKENS, Rollout, rollout_tables
from ..saes.active import Active, read_active
from ..saes.compatibility import check_dictionary
from ..saes.contexts import decode_pieces
from ..saes.dictionary import FeatureDictionary
from .measured import Answered, MeasuredChange

KEPT = 16
"""Prompts."""
MOST_FEATURES = 6


@dataclass(frozen=True)
class Samples:
    """Answers of two checkpoints to the same prompts.

    Attributes:
        dictionary, identity: name of the dictionary, and of its content.
        features: by which they were chosen, flagged ones first. Of others no activations are kept.
        rollouts: an answer before and one after to each prompt, those first that differ most.
    """

    dictionary: str
    identity: str
    features: tuple[int, ...]
    rollouts: list[Rollout]

    def tables(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Name and columns of the tables that hold them; see `record.rollouts`."""
        yield from rollout_tables(self.rollouts)


def choose_features(changes: pd.DataFrame, significant: float, flagged: Iterable[int] = ()) -> list[int]:
    """Flagged features, and those that rose beyond chance, the largest effect first; those that fell if none rose. Six at most.

    Args:
        changes: as `change_table` makes them.
        significant: q-value below which a change is beyond chance.
        flagged: numbers of features to be among them in any case.
    """
    beyond = changes[changes["q_value"] < significant].sort_values(
        "effect_size", key=lambda effect: -effect.abs(), kind="stable"
    )
    risen = beyond[beyond["effect_size"] > 0]
    moved = (risen if len(risen) else beyond)["feature"].tolist()
    return list(dict.fromkeys([*flagged, *map(int, moved)]))[:MOST_FEATURES]


def read_samples(
    model: nn.Module,
    tokenizer: Processing,
    dictionary: FeatureDictionary,
    before: Sequence[Answered],
    after: Sequence[Answered],
    measured: MeasuredChange,
    features: Sequence[int],
) -> Samples | None:
    """The answers to the prompts where some features changed most; None without features.

    Args:
        model: that reads both sets of answers, with the dictionary's hook point.
        tokenizer: of the model, or a processor that has it.
        before, after: answers to the same prompts in the same order.
        measured: the change between these answers, as `model` reads them.
        features: that count.
    """
    if not features:
        return None
    means = [part.sums[:, features] / np.maximum(part.tokens, 1)[:, None] for part in (measured.before, measured.after)]  # fmt: skip
    largest = np.max(np.abs(means), axis=(0, 1))
    units = np.where(largest > 0, largest, 1.0)
    change = ((means[1] - means[0]) / units).sum(1)
    prompts = [measured.before.prompts[place] for place in np.argsort(-np.abs(change), kind="stable")[:KEPT]]
    wanted = set(prompts)
    pairs = [
        (text, prompt, old[:MOST_TOKENS], new[:MOST_TOKENS])
        for (text, prompt, old), (_, _, new) in zip(before, after, strict=True)
        if text in wanted
    ]
    point = check_dictionary(dictionary, model)
    rows = [(tuple(prompt), tuple(answer)) for _, prompt, *answers in pairs for answer in answers]
    device = next(point.decoder.parameters()).device
    active = dict(read_active(point, dictionary.to(device), rows))
    difference = {
        place: abs(float(((_mean(active[2 * place + 1], features) - _mean(active[2 * place], features)) / units).sum()))
        for place in range(len(pairs))
    }  # fmt: skip
    chosen = [max((place for place, pair in enumerate(pairs) if pair[0] == text), key=lambda place: difference[place]) for text in prompts]  # fmt: skip
    inner = inner_tokenizer(tokenizer)
    return Samples(
        dictionary.name,
        dictionary.identity,
        tuple(features),
        [
            Rollout(
                when,
                0,
                pairs[place][0],
                tuple(decode_pieces(inner, answer)),
                {dictionary.name: _only(active[2 * place + number], features)},
            )
            for place in chosen
            for number, (when, answer) in enumerate(zip((BEFORE, AFTER), pairs[place][2:], strict=True))
        ],
    )


def _mean(active: Active, features: Sequence[int]) -> np.ndarray:
    """Mean activation a token [features]."""
    counts, found, values = active
    sums = np.array([values[found == feature].sum(dtype=np.float64) for feature in features])
    return sums / max(len(counts), 1)


def _only(active: Active, features: Sequence[int]) -> Active:
    """Some features of what is active."""
    counts, found, values = active
    kept = np.isin(found, features)
    places = np.repeat(np.arange(len(counts)), counts)[kept]
    return np.bincount(places, minlength=len(counts)), found[kept], values[kept]
