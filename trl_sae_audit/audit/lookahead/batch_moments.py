"""How the gradients of a run's batches vary, gathered from a pass over the examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .optimizer_step import BatchMoments, Tensors, UpdateRule
from .processes import is_mine, sum_of_numbers, sum_over_processes

Example = TypeVar("Example")


class BatchMomentAccumulator:
    """The second moment of the gradients of the run's batches, in the order of the data; a last, short one is left out
    where there is a full one. Every batch is of one process.

    Takes two parameter sizes of memory: the batch's gradient, and the sum of squares.

    Args:
        rule: whose batches they are.
        parameters: names and shapes.

    Attributes:
        gradient: of the batch that is being added up, summed over its examples; the caller adds to it.
    """

    def __init__(self, rule: UpdateRule, parameters: Mapping[str, Tensor]) -> None:
        self._rule = rule
        self._size = rule.batch_size or 1
        self._number = 0
        self._filled = 0
        self._clips: list[float] = []
        self.gradient = zeros_like(parameters)
        self._squares = zeros_like(parameters)

    def cut(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        """The examples in pieces, none of which belongs to two batches."""
        start = 0
        while start < len(examples):
            stop = min(len(examples), start + self._size - self._filled)
            yield examples[start:stop]
            start = stop

    @property
    def mine(self) -> bool:
        """Whether the next piece is of a batch of this process."""
        return is_mine(self._number)

    def count(self, examples: int) -> None:
        """A piece is done, by this process or by the one whose batch it is of."""
        self._filled += examples
        if self._filled == self._size:
            self._close()

    def result(self, *, last: bool = False) -> BatchMoments:
        """Of all batches so far.

        Args:
            last: no batch comes after; the memory of the sums is given up parameter by parameter as they are read.
        """
        device = next(iter(self._squares.values())).device
        n, clips = sum_of_numbers([len(self._clips), sum(self._clips)], device)
        if not n:
            self._close()
            n, clips = sum_of_numbers([len(self._clips), sum(self._clips)], device)
        self._empty()
        if last:
            self.gradient = {}

        def second(name: str) -> Tensor:
            value = self._squares.pop(name) if last else self._squares[name].clone()
            sum_over_processes([value])
            return value.div_(n)

        return BatchMoments(second, clips / n)

    def _close(self) -> None:
        if self._filled and self.mine:
            clip = self._rule.clip(self.gradient, 1 / self._filled)
            for name, value in self.gradient.items():
                self._squares[name].addcmul_(value, value, value=(clip / self._filled) ** 2)
            self._clips.append(clip)
        self._empty()
        self._number += 1

    def _empty(self) -> None:
        self._filled = 0
        for value in self.gradient.values():
            value.zero_()


def zeros_like(parameters: Mapping[str, Tensor]) -> Tensors:
    """Zeros by parameter, in float32 or wider."""
    return {name: torch.zeros_like(value, dtype=wide(value)) for name, value in parameters.items()}


def wide(value: Tensor) -> torch.dtype:
    """float32, or the tensor's own type where that is wider."""
    return torch.promote_types(value.dtype, torch.float32)


def accumulate(sums: Tensors, found: Mapping[str, Tensor | None]) -> None:
    """Adds what was found, by name, to the sums; None is nothing."""
    for name, value in found.items():
        if value is None:
            continue
        if name in sums:
            sums[name] += value
        else:
            sums[name] = value.clone()
