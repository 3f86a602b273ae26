"""Where features are most active in the response tokens that a run's selection encodes: a small reservoir beside the training.

On the device there are `KEPT` activations and places a feature, and of each micro-batch a feature's strongest token may enter: 13 MB
for 131,072 features. Of the places that are new since the last `take` the tokens around them wait in memory: at most a million of them,
350 MB, were every place of 131,072 features another token's and new. Nothing waits for the device before `take` or `settle`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..saes.contexts import AFTER, BEFORE, KEPT, Places

_WRITTEN = -1
_SHIFT = 32
MOST_PENDING = 2**20
"""Tokens of texts that wait on the device to be looked at: 8 MiB of ids."""


@dataclass(frozen=True)
class Peaks:
    """The strongest of some encoded tokens, by feature.

    Attributes:
        activation: [d_sae]; 0 where no token shows the feature.
        place: in the flattened [rows × tokens] of the forward [d_sae].
        ids, counted: token ids of the forward and which of them are a response's, [rows, tokens] both.
        lengths: of the examples packed into its one row, else None.
    """

    activation: Tensor
    place: Tensor
    ids: Tensor
    counted: Tensor
    lengths: Tensor | None


@dataclass(frozen=True)
class ResponseWindow:
    """The tokens around a place; some 350 bytes.

    Attributes:
        prompt, tokens: ids of the prompt's end, and of the response around the place.
        place: which of `tokens` is marked.
        row, rows: of the forward, and how many it had.
    """

    prompt: array[int]
    tokens: array[int]
    place: int
    row: int
    rows: int


class ContextReservoir:
    """The strongest places so far, and the texts of those that are new.

    Args:
        d_sae: features.
        device: of the activations.
        kept: places of each feature.
    """

    def __init__(self, d_sae: int, device: torch.device, kept: int = KEPT) -> None:
        self._value = torch.zeros(kept, d_sae, dtype=torch.float32, device=device)
        self._place = torch.full((kept, d_sae), _WRITTEN, dtype=torch.int64, device=device)
        self._texts: dict[int, Peaks] = {}
        self._windows: dict[int, ResponseWindow] = {}
        self._seen = 0

    def add(self, peaks: Peaks) -> None:
        """A micro-batch: each feature's strongest token replaces the weakest that is kept, where it is stronger."""
        number, self._seen = self._seen, self._seen + 1
        self._texts[number] = peaks
        least, at = self._value.min(0, keepdim=True)
        activation, place = peaks.activation[None], peaks.place[None] + (number << _SHIFT)
        higher = activation > least
        self._value.scatter_(0, at, torch.where(higher, activation, least))
        self._place.scatter_(0, at, torch.where(higher, place, self._place.gather(0, at)))

    @property
    def is_full(self) -> bool:
        """Whether so many texts wait that they should be looked at."""
        return sum(peaks.ids.numel() for peaks in self._texts.values()) > MOST_PENDING

    def settle(self) -> None:
        """Keep the windows of the places that are still among the strongest, and let go of the texts."""
        place = self._place.cpu().numpy()
        wanted = set(np.unique(place[place != _WRITTEN]).tolist())
        known = {number: window for number, window in self._windows.items() if number in wanted}
        texts = {number: _HostText.of(peaks) for number, peaks in self._texts.items()}
        for number in wanted - known.keys():
            known[number] = texts[number >> _SHIFT].window(number & ((1 << _SHIFT) - 1))
        self._windows, self._texts = known, {}

    def take(self) -> tuple[Places, dict[int, ResponseWindow]]:
        """What has come in since the last call and is still among the strongest; `text` names its window."""
        self.settle()
        value, place = (part.cpu().numpy().copy() for part in (self._value, self._place))
        row, feature = (place != _WRITTEN).nonzero()
        windows, self._windows = self._windows, {}
        self._place.fill_(_WRITTEN)
        number = place[row, feature]
        token = np.array([windows[each].place for each in number.tolist()], np.int32)
        return Places(feature.astype(np.int32), value[row, feature], number, token), windows


@dataclass(frozen=True)
class _HostText:
    """A forward's tokens where numpy can read them."""

    ids: np.ndarray
    counted: np.ndarray
    borders: np.ndarray

    @classmethod
    def of(cls, peaks: Peaks) -> _HostText:
        rows, tokens = peaks.ids.shape
        if peaks.lengths is None:
            borders = np.arange(rows + 1) * tokens
        else:
            borders = np.concatenate([[0], np.cumsum(peaks.lengths.cpu().numpy())])
        ids, counted = (part.cpu().numpy().reshape(-1) for part in (peaks.ids, peaks.counted))
        return cls(ids, counted.astype(bool), borders)

    def window(self, place: int) -> ResponseWindow:
        row = int(np.searchsorted(self.borders, place, side="right")) - 1
        start, end = int(self.borders[row]), int(self.borders[row + 1])
        begin = place
        while begin > start and self.counted[begin - 1]:
            begin -= 1
        first = max(begin, place - BEFORE)
        last = place + 1
        while last < min(end, place + AFTER + 1) and self.counted[last]:
            last += 1
        prompt = array("i", self.ids[max(start, begin - BEFORE) : begin].tolist())
        tokens = array("i", self.ids[first:last].tolist())
        return ResponseWindow(prompt, tokens, place - first, row, len(self.borders) - 1)
