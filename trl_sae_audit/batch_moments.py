"""How the gradients of a run's batches vary, gathered from a pass over the examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .update_rule import BatchMoments, UpdateRule

Example = TypeVar("Example")


class MomentsOfBatches:
    """The second moment of the gradients of the run's batches, in the order of the data; a last, short one is left out
    where there is a full one."""

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule
        self._size = rule.batch_size or 1
        self._sum: dict[str, Tensor] = {}
        self._filled = 0
        self._squares: dict[str, Tensor] = {}
        self._clips: list[float] = []

    def cut(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        """The examples in pieces, none of which belongs to two batches."""
        start = 0
        while start < len(examples):
            stop = min(len(examples), start + self._size - self._filled)
            yield examples[start:stop]
            start = stop

    def add(self, summed: Mapping[str, Tensor], count: int) -> None:
        """The summed gradient of a piece."""
        accumulate(self._sum, summed)
        self._filled += count
        if self._filled == self._size:
            self._close()

    def result(self, mean: Mapping[str, Tensor]) -> BatchMoments:
        """Of all batches so far; `mean` gives names and shapes."""
        if not self._clips:
            self._close()
        self._sum, self._filled = {}, 0
        n = len(self._clips)
        second = {
            name: self._squares[name] / n if name in self._squares else torch.zeros_like(value)
            for name, value in mean.items()
        }
        return BatchMoments(second, sum(self._clips) / n)

    def _close(self) -> None:
        gradient = {name: value / self._filled for name, value in self._sum.items()}
        clip = self._rule.clip(gradient)
        squares = {name: (clip * value).square() for name, value in gradient.items()}
        accumulate(self._squares, squares)
        self._clips.append(clip)
        self._sum, self._filled = {}, 0


def accumulate(sums: dict[str, Tensor], found: Mapping[str, Tensor | None]) -> None:
    """Adds what was found, by name, to the sums; None is nothing."""
    for name, value in found.items():
        if value is not None:
            sums[name] = sums[name] + value if name in sums else value
