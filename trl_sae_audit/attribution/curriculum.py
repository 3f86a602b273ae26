"""When in a run a feature was pushed: a map over time whose size does not grow with the run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..errors import AuditError


class CurriculumMap:
    """Sums over [time bins × features] whose size does not grow: when the bins are full, neighbours merge.

    Bins start one step wide; each merge doubles the width, so bin b holds steps `b·width + 1 … (b+1)·width`.

    Args:
        n_features: F.
        max_bins: most bins ever held, an even number from 2 to 4096.
    """

    def __init__(self, n_features: int, max_bins: int = 64):
        if max_bins % 2 or not 2 <= max_bins <= 4096:
            raise AuditError(
                f"max_bins is {max_bins}, but bins merge in pairs: choose an even number, 2 to 4096."
            )
        self.max_bins = max_bins
        self.width = 1
        self.last_step = 0
        self._sums = np.zeros((max_bins, n_features), np.float32)
        self._counts = np.zeros(max_bins, np.int64)

    @property
    def sums(self) -> np.ndarray:
        """Sum of attribution in each bin started so far, [bins, F] float32."""
        return self._sums[: self._n_bins]

    @property
    def counts(self) -> np.ndarray:
        """Steps added to each bin, [bins] int64; steps that were skipped are not among them."""
        return self._counts[: self._n_bins]

    @property
    def _n_bins(self) -> int:
        return -(-self.last_step // self.width)

    def add(self, attribution: np.ndarray) -> None:
        """Count the next step, with its attribution [F]."""
        self.skip()
        index = (self.last_step - 1) // self.width
        self._sums[index] += attribution
        self._counts[index] += 1

    def skip(self) -> None:
        """Let the next step pass without adding anything."""
        self.last_step += 1
        if self.last_step > self.width * self.max_bins:
            self._merge_neighbours()

    def _merge_neighbours(self) -> None:
        half = self.max_bins // 2
        for index in range(half):
            np.add(self._sums[2 * index], self._sums[2 * index + 1], out=self._sums[index])
        self._sums[half:] = 0
        self._counts[:half] = self._counts[0::2] + self._counts[1::2]
        self._counts[half:] = 0
        self.width *= 2

    def means(self) -> np.ndarray:
        """Mean attribution per step in each bin, [bins, F] float32; NaN in a bin without a finite step."""
        counts = np.where(self.counts, self.counts, np.nan).astype(np.float32)
        return self.sums / counts[:, None]

    def frame(self) -> pd.DataFrame:
        """`means` with the bins' (first_step, last_step) as index and the features as columns."""
        first = np.arange(self._n_bins) * self.width + 1
        last = np.minimum(first + self.width - 1, self.last_step)
        index = pd.MultiIndex.from_arrays([first, last], names=["first_step", "last_step"])
        columns = pd.RangeIndex(self._sums.shape[1], name="feature")
        return pd.DataFrame(self.means(), index=index, columns=columns, copy=False)

    def load(self, sums: np.ndarray, counts: np.ndarray, width: int, last_step: int) -> None:
        """Take over the state of another map of the same size."""
        self.width, self.last_step = width, last_step
        self._sums[: len(sums)] = sums
        self._counts[: len(counts)] = counts
