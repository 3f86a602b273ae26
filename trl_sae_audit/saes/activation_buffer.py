"""Shuffled activations from a store of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AuditError
from .progress import progress_bar


class ActivationBuffer(Iterator[Tensor]):
    """Endless shuffled batches [batch_size, d_model] of activations, float32 on the CPU.

    The activations lie in a memory-mapped file of at most `capacity` rows. If the source fits, it is read once and
    every row is used once an epoch. If not, half of the store is used up at a time and replaced by the next rows
    of the source, which starts over when it ends; so a batch always mixes texts far apart.

    Args:
        source: starts a pass over the activations, yielding [n, d_model].
        capacity: rows held.
        d_model: width of a row.
        batch_size: rows of a batch.
        file: where the store lies; its size is capacity × d_model × 4 bytes, less if the source is smaller.
        seed: of the shuffling.
        expected: about how many rows the source has, for the progress bar.

    Raises:
        AuditError: if the source has fewer rows than a batch, or a row that is not finite.
    """

    def __init__(
        self,
        source: Callable[[], Iterator[Tensor]],
        capacity: int,
        d_model: int,
        batch_size: int,
        file: Path,
        seed: int,
        expected: int | None = None,
    ) -> None:
        self._source = source
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._store = torch.from_file(
            str(file), shared=True, size=capacity * d_model, dtype=torch.float32
        ).view(capacity, d_model)
        self._stream = source()
        self._rest = torch.empty(0, d_model, dtype=torch.float32)
        self._size = self._fill_first(expected)
        self.complete = self._size < capacity
        if self._size < batch_size:
            raise AuditError(
                f"The texts give only {self._size} activations, fewer than one batch of {batch_size}; give more text or "
                "a smaller sae_batch_size."
            )
        self._shuffle()

    @property
    def rows(self) -> Tensor:
        """What the store holds now: [rows, d_model]."""
        return self._store[: self._size]

    def __next__(self) -> Tensor:
        limit = self._size if self.complete else max(self._size // 2, self._batch_size)
        if self._used + self._batch_size > limit:
            if not self.complete:
                self._replace(self._order[: self._used])
            self._shuffle()
        batch = self._store[self._order[self._used : self._used + self._batch_size]]
        self._used += self._batch_size
        return batch

    def _shuffle(self) -> None:
        self._order = torch.randperm(self._size, generator=self._generator)
        self._used = 0

    def _fill_first(self, expected: int | None) -> int:
        filled, capacity = 0, self._store.shape[0]
        total = None if expected is None else min(expected, capacity)
        with progress_bar(total=total, desc="Activations", unit=" tokens") as bar:
            while filled < capacity and (rows := self._read(capacity - filled)) is not None:
                self._store[filled : filled + len(rows)] = rows
                filled += len(rows)
                bar.update(len(rows))
            bar.total = filled
        return filled

    def _replace(self, places: Tensor) -> None:
        while len(places) > 0:
            rows = self._read(len(places))
            if rows is None:
                self._stream = self._source()
                continue
            self._store[places[: len(rows)]] = rows
            places = places[len(rows) :]

    def _read(self, most: int) -> Tensor | None:
        """The next rows of the source, at most that many; None at its end."""
        if len(self._rest) == 0:
            rows = next(self._stream, None)
            if rows is None:
                return None
            if not bool(torch.isfinite(rows).all()):
                raise AuditError(
                    "The model's residual stream is not finite on these texts; load the model in float32 or bfloat16."
                )
            self._rest = rows.cpu()
        rows, self._rest = self._rest[:most], self._rest[most:]
        return rows
