"""The record of a run while it trains: what cannot be written is said and tried again, and never ends the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..attribution.totals import FeatureTotals
from ..errors import RecordWriteError
from .manifest import Status
from .writer import RecordWriter

logger = logging.getLogger(__name__)

MOST_WAITING = 256 * 2**20
"""Bytes of rows that wait in memory for a disk to become writable again, before the record is given up."""


class ResilientWriter:
    """Writes a run's record, on its main process, and outlives a disk that fails.

    A training is worth more than its record. A write that fails is logged as an error, once for each reason, and tried
    again when the next is due; until then totals and rows stay in memory, so that nothing is lost if it then
    succeeds. When `MOST_WAITING` bytes of rows wait, the record is given up: it stays as it was last written.

    Args:
        writer: of the record.
        flush_seconds: time between two writes, by a clock that no one can set.
    """

    def __init__(self, writer: RecordWriter, flush_seconds: float) -> None:
        self._writer = writer
        self._flush_seconds = flush_seconds
        self._last_attempt = time.monotonic()
        self._trouble: str | None = None

    @property
    def directory(self) -> Path:
        """Of the record."""
        return self._writer.directory

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last_attempt > self._flush_seconds

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Add rows to a table, in memory until the next write."""
        if not self._writer.closed:
            self._writer.append(table, columns)

    def write(
        self, step: int, totals: Mapping[str, FeatureTotals], extra: Mapping[str, Any] | None = None
    ) -> bool:
        """Put rows and totals on disk; whether that was possible. For the arguments see `RecordWriter.flush`."""
        if self._writer.closed:
            return False
        self._last_attempt = time.monotonic()
        try:
            self._writer.flush(step, totals, extra)
        except RecordWriteError as error:
            self._report(error)
            return False
        if self._trouble is not None:
            self._trouble = None
            logger.warning("The run record in %s is written again, up to step %d.", self.directory, step)
        return True

    def close(
        self, status: Status, step: int | None = None, totals: Mapping[str, FeatureTotals] | None = None
    ) -> None:
        """End the record; for the arguments see `RecordWriter.close`."""
        try:
            self._writer.close(status, step, totals)
        except RecordWriteError as error:
            logger.error("%s The run has ended, and later steps are not in the record.", error)

    def _report(self, error: RecordWriteError) -> None:
        if self._writer.waiting_bytes > MOST_WAITING:
            self._writer.abandon()
            logger.error(
                "%s Training goes on, but %d MiB of rows wait for it by now, so the record is given up: it ends at step "
                "%d.",
                *(error, MOST_WAITING >> 20, self._writer.last_step),
            )
        elif error.reason != self._trouble:
            logger.error(
                "%s Training goes on, and the steps since then wait in memory for the next attempt.",
                error,
            )
        self._trouble = error.reason
