"""Words: contexts of a feature in one short line, for tables: `Great question! · absolutely right · what a great`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

PHRASES = 3
"""Phrases in a line at most."""
_LONGEST = 6  # words of a phrase
_NEAR = 80  # characters on either side of a place that are looked at
_LEAST = 3  # words of a phrase that only one context has
_WORD = re.compile(r"<[|｜]?[\w/▁]+[|｜]?>|[^\W_]+(?:['’\-][^\W_]+)*|[^\w\s<]+|<|_+")

_SPECIAL = re.compile(
    r"<[|｜][^\s<>]+[|｜]>|</?s>|</?(?:bos|eos|pad|unk|sep|cls|(?:start|end)_of_(?:turn|text))>",
    re.IGNORECASE,
)
"""Tokens that no one wrote: the end of an answer, of a turn."""
_END = re.compile(r"eos|/s>|end|eot", re.IGNORECASE)
END = "[end]"
"""How words say that a feature is active where an answer or a turn ends."""

Context = tuple[str, str, str]
"""Text before the place, at it, after it."""


def words_of(contexts: Sequence[Context], phrases: int = PHRASES) -> str:
    """The phrases that a feature's contexts share around the place, most shared first; then of single contexts, strongest first.

    A phrase is the word at the place with its neighbours, as far as at least half of the contexts with that word agree on them.

    Args:
        contexts: the strongest first.
        phrases: how many at most.
    """
    groups: dict[str, list[tuple[list[str], int]]] = {}
    for before, at, after in contexts:
        tokens, place = _split(_end_of(before), at, after[:_NEAR])
        if tokens:
            groups.setdefault(tokens[place].strip().casefold(), []).append((tokens, place))
    ranked = sorted(groups.values(), key=lambda group: -len(group))
    found: list[str] = []
    for group in ranked:
        phrase = _phrase(group)
        known = [_key(each) for each in found]
        if not _key(phrase).strip() or any(_key(phrase) in each for each in known):
            continue
        found = [each for each in found if _key(each) not in _key(phrase)]
        found.append(phrase)
        if len(found) == phrases:
            break
    return " · ".join(found)


def lines_of(contexts: pd.DataFrame) -> dict[int, str]:
    """Feature → its words, of contexts by feature, the strongest first.

    A direction without an encoder is projected on, and may be negative: its words are of the sign of its strongest place.
    """
    lines: dict[int, str] = {}
    rows = contexts[["feature", "activation", "before", "at", "after"]].itertuples(index=False)
    for feature, group in _grouped(rows):
        sign = group[0][1] > 0
        lines[feature] = words_of([texts for _, value, *texts in group if (value > 0) == sign])
    return lines


def _grouped(rows: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    group: list[Any] = []
    for row in rows:
        if group and row[0] != group[0][0]:
            yield group[0][0], group
            group = []
        group.append(row)
    if group:
        yield group[0][0], group


def _end_of(text: str) -> str:
    """The last words of a long text."""
    return text if len(text) <= _NEAR else text[-_NEAR:].partition(" ")[2] or text[-_NEAR:]


def _key(phrase: str) -> str:
    return f" {' '.join(_WORD.findall(phrase.casefold()))} "


def _split(before: str, at: str, after: str) -> tuple[list[str], int]:
    """The words of a context, each with the space before it, and which of them has the place.

    Special tokens are no words but where they have the place themselves; those of an end are shown as `END`.
    """
    text = before + at + after
    mark = len(before) + len(at) - len(at.lstrip()) if at.strip() else max(0, len(before) - 1)
    spans = [match.span() for match in _WORD.finditer(text)]
    if not spans:
        return [], 0
    place = next((n for n, (_, end) in enumerate(spans) if end > mark), len(spans) - 1)
    starts = [0, *(end for _, end in spans)]
    tokens = [text[start:end] for start, (_, end) in zip(starts, spans, strict=False)]
    special = [bool(_SPECIAL.fullmatch(token.strip())) for token in tokens]
    if special[place] and _END.search(tokens[place]):
        tokens[place] = f" {END}"
    kept = [n for n in range(len(tokens)) if n == place or not special[n]]
    return [tokens[n] for n in kept], kept.index(place)


def _phrase(group: Sequence[tuple[list[str], int]]) -> str:
    tokens, place = group[0]
    left = right = place
    if len(group) > 1:
        while right - left + 1 < _LONGEST:
            ahead, behind = _agreed(group, place - left + 1, -1), _agreed(group, right - place + 1, 1)
            if ahead is None and behind is None:
                break
            if ahead is not None and (behind is None or ahead[1] >= behind[1]):
                left, group = left - 1, ahead[0]
            else:
                assert behind is not None
                right, group = right + 1, behind[0]
            shift = group[0][1] - place
            tokens, place = group[0]
            left, right = left + shift, right + shift
    while right - left + 1 < _LEAST and (left > 0 or right + 1 < len(tokens)):
        if left > 0 and place - left < _LEAST - 1:
            left -= 1
        elif right + 1 < len(tokens):
            right += 1
        else:
            break
    return _tidy("".join(tokens[left : right + 1]))


def _agreed(
    group: Sequence[tuple[list[str], int]], distance: int, side: int
) -> tuple[list[tuple[list[str], int]], int] | None:
    """The contexts that have the most frequent neighbour at a distance, if they are at least two and half of all."""
    neighbours = [
        tokens[place + side * distance].strip().casefold()
        if 0 <= place + side * distance < len(tokens)
        else ""
        for tokens, place in group
    ]
    (word, times), *_ = Counter(neighbours).most_common(1)
    if not word or times < 2 or 2 * times < len(group):
        return None
    return [each for each, neighbour in zip(group, neighbours, strict=True) if neighbour == word], times


def _tidy(phrase: str) -> str:
    flat = " ".join(phrase.split())
    return flat.lstrip(".,;:!?)]} ") or flat
