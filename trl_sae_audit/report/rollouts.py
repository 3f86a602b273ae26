"""The reader: answers before and after, side by side, their words marked where watched and risen features are active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..record.rollouts import BEFORE, Rollout
from ..text import sanitize, sanitize_excerpt
from .lead import known_leads, read_lead
from .sources import View
from .tables import strip_number

_MOST_FEATURES = 6
_LEAST = 0.25
"""Of a feature's largest activation in these answers, from which a word is marked."""
_LONGEST_PROMPT = 300


@dataclass(frozen=True)
class Piece:
    """Some text; which of the shown features is most active there, and how strongly, 0 to 1. No feature: −1."""

    text: str
    shown: int
    level: float


@dataclass(frozen=True)
class Sample:
    """An answer: the step that was trained on it (0: sampled apart), its prompt and its text in pieces."""

    sampled: int
    prompt: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Pair:
    """An answer before and one after, to the same prompt where the run came by it again.

    Attributes:
        same: whether the prompt is the same.
        change: how much more of the shown features there is after: mean activation a token, in units of the features' largest.
    """

    before: Sample | None
    after: Sample | None
    same: bool
    change: float


@dataclass(frozen=True)
class Reader:
    """The answers, those first that changed most. `features`: which are marked, first the watched ones."""

    features: list[int]
    pairs: list[Pair]


def build_reader(view: View, rollouts: Sequence[Rollout]) -> Reader | None:
    """Pair and mark a run's rollouts by the features that `choose_features` gives; see `pair_rollouts`."""
    return pair_rollouts(view.name, choose_features(view), rollouts)


def pair_rollouts(dictionary: str, features: list[int], rollouts: Sequence[Rollout]) -> Reader | None:
    """Pair and mark some rollouts; None where there are none after, or nothing to mark."""
    rollouts = [each for each in rollouts if dictionary in each.active]
    if not features or not any(each.when != BEFORE for each in rollouts):
        return None
    values = [_activations(each, dictionary, features) for each in rollouts]
    largest = np.max([part.max(axis=0, initial=0.0) for part in values], axis=0)
    scaled = [part / np.where(largest > 0, largest, 1.0) for part in values]
    samples = {
        place: (Sample(each.sampled, sanitize(each.prompt[-_LONGEST_PROMPT:]), _mark(each.pieces, scaled[place])), float(scaled[place].sum(1).mean()) if len(each.pieces) else 0.0)
        for place, each in enumerate(rollouts)
    }  # fmt: skip
    old = {each.prompt: place for place, each in enumerate(rollouts) if each.when == BEFORE}
    new = {each.prompt: place for place, each in enumerate(rollouts) if each.when != BEFORE}
    pairs = [
        Pair(samples[old[prompt]][0], samples[new[prompt]][0], True, samples[new[prompt]][1] - samples[old[prompt]][1])
        for prompt in old
        if prompt in new
    ]  # fmt: skip
    alone = [
        sorted((place for prompt, place in own.items() if prompt not in other), key=lambda place: -samples[place][1])
        for own, other in ((old, new), (new, old))
    ]  # fmt: skip
    alone[0].reverse()
    for place in range(max(map(len, alone))):
        first, second = (samples[part[place]] if place < len(part) else (None, 0.0) for part in alone)
        pairs.append(Pair(first[0], second[0], False, second[1] - first[1]))
    return Reader(features, sorted(pairs, key=lambda pair: (not pair.same, -abs(pair.change))))


def choose_features(view: View) -> list[int]:
    """The watched features, and those that rise most beyond chance."""
    score = read_lead(view.features, known_leads(view.features)[0])
    risen = score[(score["value"] > 0) & score["clear"]].sort_values("rank", ascending=False, kind="stable")
    return list(dict.fromkeys([*view.watched.values(), *map(int, risen.index)]))[:_MOST_FEATURES]


def _activations(rollout: Rollout, dictionary: str, features: Sequence[int]) -> np.ndarray:
    """Of the features at the answer's tokens, [tokens, features]; what is negative counts as none."""
    counts, found, values = rollout.active[dictionary]
    dense = np.zeros((len(rollout.pieces), len(features)))
    tokens = np.repeat(np.arange(len(counts)), counts)
    for column, feature in enumerate(features):
        own = found == feature
        dense[tokens[own], column] = values[own]
    return np.maximum(dense, 0.0)


def _mark(pieces: Sequence[str], levels: np.ndarray) -> list[Piece]:
    """The answer's text, neighbours with the same mark joined."""
    found: list[Piece] = []
    for text, row in zip(pieces, levels, strict=True):
        shown = int(row.argmax())
        level = float(row[shown])
        if level < _LEAST:
            shown, level = -1, 0.0
        space = len(text) - len(text.lstrip()) if shown >= 0 and text.strip() else 0
        for part, which in ((text[:space], -1), (text[space:], shown)):
            if part and found and found[-1].shown == which == -1:
                found[-1] = Piece(found[-1].text + sanitize(part), -1, 0.0)
            elif part:
                found.append(
                    Piece(sanitize_excerpt(part, 200), which, round(level, 2) if which >= 0 else 0.0)
                )
    return found


def mark_excerpt(sample: Sample, longest: int) -> str:
    """A part of the answer, `longest` characters, around where it is most marked: on one line, with «» around marked words."""
    parts = [f"«{piece.text}»" if piece.shown >= 0 else piece.text for piece in sample.pieces]
    levels = [piece.level for piece in sample.pieces]
    strongest = levels.index(max(levels)) if levels else 0
    line, place = "".join(parts), len("".join(parts[:strongest]))
    start = max(0, min(place - longest // 3, len(line) - longest))
    shown = " ".join(line[start : start + longest].split()).replace("» «", " ").replace("»«", "")
    return f"{'…' if start else ''}{shown}{'…' if start + longest < len(line) else ''}"


def name_features(view: View, features: Sequence[int], about: Mapping[int, str]) -> list[tuple[int, str]]:
    """Each feature with its label or its first words."""
    labels = {feature: label for label, feature in view.watched.items()}
    return [
        (
            feature,
            sanitize_excerpt(
                strip_number(feature, labels.get(feature, "")) or about.get(feature, "").split("; raises")[0],
                60,
            ),
        )
        for feature in features
    ]
