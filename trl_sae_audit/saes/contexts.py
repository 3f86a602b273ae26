"""Contexts: where in the texts a feature is most active, kept as places while the texts go by and decoded at the end.

A place is a token of a text. Of each text a feature keeps its strongest token, so that contexts differ. What is kept is numbers
only, `Places`, which several processes or parts of the data make by themselves and `strongest` merges: the result is that of one
pass over everything. Texts come back by `decode_places`, from the token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

KEPT = 8
"""Places of a feature that are kept because it is strongest there."""
DRAWN = 4
"""Places of a feature that are drawn at random among the texts in which it is active: its activation as it usually is."""
BEFORE, AFTER = 20, 8
"""Tokens of the text shown on either side of a place."""
BYTES_A_PLACE = 24
"""What a place takes in memory; with `KEPT` and `DRAWN` of 131,072 features 38 MB."""


@dataclass(frozen=True)
class Places:
    """Tokens at which features are active, one row a place.

    Attributes:
        feature: [n] int32.
        activation: of the feature there [n] float32.
        text: which text [n] int64.
        token: which of its tokens [n] int32.
    """

    feature: np.ndarray
    activation: np.ndarray
    text: np.ndarray
    token: np.ndarray

    @classmethod
    def none(cls) -> Places:
        return cls(*(np.zeros(0, kind) for kind in (np.int32, np.float32, np.int64, np.int32)))

    @classmethod
    def join(cls, parts: Iterable[Places]) -> Places:
        """All places of some parts."""
        found = [cls.none(), *parts]
        return cls(*(np.concatenate([getattr(part, each.name) for part in found]) for each in fields(cls)))

    def take(self, which: np.ndarray) -> Places:
        """Those at an index or a mask."""
        return Places(*(getattr(self, each.name)[which] for each in fields(self)))

    def __len__(self) -> int:
        return len(self.feature)


def strongest(places: Places, kept: int = KEPT) -> Places:
    """Each feature's places of the largest activation in size, one a text: by feature, the strongest first.

    Merges: `strongest(join([strongest(a), strongest(b)]))` is `strongest(join([a, b]))`.
    """
    return _first(places, (-np.abs(places.activation),), kept)


def drawn(places: Places, kept: int = DRAWN) -> Places:
    """Each feature's places drawn evenly among the texts in which it is active, the strongest first; merges like `strongest`.

    The draw is by a random number that feature and text determine: whoever sees the place gives it the same one.
    """
    chosen = _first(strongest(places, len(places)), (), kept, by_draw=True)
    return chosen.take(np.lexsort((-np.abs(chosen.activation), chosen.feature)))


def _first(places: Places, keys: tuple[np.ndarray, ...], kept: int, by_draw: bool = False) -> Places:
    if by_draw:
        keys = (_random(places),)
    order = np.lexsort((places.token, places.text, *keys, places.feature))
    found = places.take(order)
    pair = found.feature.astype(np.int64) << 40 | found.text
    first = np.sort(np.unique(pair, return_index=True)[1])
    found = found.take(first)
    begin = np.searchsorted(found.feature, found.feature)
    return found.take(np.arange(len(found)) - begin < kept)


def _random(places: Places) -> np.ndarray:
    """A number of each pair of feature and text, uniform over uint64 (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        value = (places.text.astype(np.uint64) << np.uint64(24)) ^ places.feature.astype(np.uint64)
        value = value * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class PlaceKeeper:
    """Keeps the strongest and the drawn places of a stream, in bounded memory.

    Args:
        d_sae: features.
        kept, drawn: places of each feature.
    """

    def __init__(self, d_sae: int, kept: int = KEPT, drawn: int = DRAWN) -> None:
        self._kept, self._drawn = kept, drawn
        self._strongest, self._sample = Places.none(), Places.none()
        self._least = np.zeros(d_sae, np.float32)
        self._last = np.full(d_sae, np.iinfo(np.uint64).max, np.uint64)

    def add(self, places: Places) -> None:
        """See some more places, of each text all that there are of a feature."""
        strong = places.take(np.abs(places.activation) >= self._least[places.feature])
        self._strongest = strongest(Places.join([self._strongest, strong]), self._kept)
        self._least = self._limit(
            self._strongest, np.abs(self._strongest.activation), self._kept, self._least
        )
        if self._drawn:
            likely = places.take(_random(places) <= self._last[places.feature])
            self._sample = drawn(Places.join([self._sample, likely]), self._drawn)
            chance = _random(self._sample)
            order = np.lexsort((chance, self._sample.feature))
            self._last = self._limit(self._sample.take(order), chance[order], self._drawn, self._last)

    def _limit(self, places: Places, values: np.ndarray, kept: int, limits: np.ndarray) -> np.ndarray:
        """The value of each feature's last place, where it has all that are kept of it."""
        begin = np.searchsorted(places.feature, places.feature)
        full = np.arange(len(places)) - begin == kept - 1
        limits = limits.copy()
        limits[places.feature[full]] = values[full]
        return limits

    @property
    def least(self) -> np.ndarray:
        """What a place must have in size to be kept as one of the strongest [d_sae]; 0 of a feature that has fewer."""
        return self._least

    @property
    def strongest(self) -> Places:
        return self._strongest

    @property
    def drawn(self) -> Places:
        return self._sample


@dataclass(frozen=True)
class Window:
    """A place with the tokens around it.

    Attributes:
        tokens: ids, `BEFORE` and `AFTER` the place at most.
        place: which of them is marked.
    """

    tokens: tuple[int, ...]
    place: int

    @classmethod
    def around(cls, tokens: Sequence[int] | np.ndarray, place: int) -> Window:
        """Of a text's tokens."""
        start = max(0, place - BEFORE)
        return cls(tuple(int(token) for token in tokens[start : place + AFTER + 1]), place - start)


def decode_windows(
    tokenizer: PreTrainedTokenizerBase, windows: Sequence[Window]
) -> list[tuple[str, str, str]]:
    """Text before the place, at it, and after it: parts of the window decoded as a whole, so that spaces are as in the text.

    A token that holds a part of a character gets all of it.
    """
    distinct = list(dict.fromkeys(windows))
    whole = decode(tokenizer, [window.tokens for window in distinct])
    upto = decode(tokenizer, [window.tokens[: window.place] for window in distinct])
    through = decode(tokenizer, [window.tokens[: window.place + 1] for window in distinct])
    found = {}
    for window, text, *ends in zip(distinct, whole, upto, through, strict=True):
        begin, end = (_shared(text, part) for part in ends)
        if end <= begin:  # the character ends in a later token
            end = min(begin + 1, len(text))
        found[window] = text[:begin].lstrip("�"), text[begin:end], text[end:].rstrip("�")
    return [found[window] for window in windows]


def decode_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text of each token, cut out of the text decoded as a whole: joined they are that text.

    A character that several tokens make up is the last one's.
    """
    prefixes = decode(tokenizer, [tokens[: end + 1] for end in range(len(tokens))])
    if not prefixes:
        return []
    text = prefixes[-1]
    ends = np.maximum.accumulate([_shared(text, part) for part in prefixes[:-1]] + [len(text)]).tolist()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of token ids, special tokens too."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):  # many at once, twenty times as fast
        return tokenizer.backend_tokenizer.decode_batch(
            [list(row) for row in rows], skip_special_tokens=False
        )
    return [tokenizer.decode(list(row), clean_up_tokenization_spaces=False) for row in rows]


def _shared(text: str, part: str) -> int:
    """Where a decoded beginning ends in the whole, without what is left of a character that it cuts."""
    part = part.rstrip("�")
    if text.startswith(part):
        return len(part)
    return next(
        (place for place, (a, b) in enumerate(zip(text, part, strict=False)) if a != b),
        min(len(text), len(part)),
    )
