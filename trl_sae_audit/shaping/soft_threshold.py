"""Whether a response shows a behaviour: a ramp between the two kinds of responses that a reference model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_RANGE, _BINS = 10.0, 400
BIN_CENTRES = (np.arange(_BINS) + 0.5) * (2 * _RANGE / _BINS) - _RANGE
_LEAST_DEVIATION = 0.1  # of q: that of a behaviour shown in one response of a hundred
_INWARD = 0.25
_LEAST_CLASS = 5  # responses: fewer are outliers, not a kind


def histogram(scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Counts, or sums of `weights` [n], of scores [n, k] in 400 bins from −10 to 10, with values beyond in the outermost bins: [k, 400].

    Histograms add up, over processes too, where the scores themselves would have to be gathered.
    """
    index = np.floor((scores + _RANGE) * (_BINS / (2 * _RANGE))).astype(int).clip(0, _BINS - 1)
    result = np.zeros((scores.shape[1], _BINS))
    for column in range(scores.shape[1]):
        np.add.at(result[column], index[:, column], 1.0 if weights is None else weights)
    return result


class SoftThreshold:
    """x = (q − mean) / deviation with q = clip((S − low) / (high − low), 0, 1), for k behaviours at once.

    Args:
        low, high: [k], where the ramp begins and ends.
        mean, deviation: [k], of q over the reference's responses.
    """

    def __init__(
        self,
        low: Sequence[float] | np.ndarray,
        high: Sequence[float] | np.ndarray,
        mean: Sequence[float] | np.ndarray,
        deviation: Sequence[float] | np.ndarray,
    ) -> None:
        self.low, self.high = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
        self.mean, self.deviation = np.asarray(mean, dtype=float), np.asarray(deviation, dtype=float)

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """x of scores [n, k]."""
        ramp = np.clip((scores - self.low) / (self.high - self.low), 0.0, 1.0)
        return (ramp - self.mean) / self.deviation

    @property
    def slope(self) -> np.ndarray:
        """dx/dS within the ramp, [k]."""
        return 1.0 / ((self.high - self.low) * self.deviation)

    def state(self) -> dict[str, Any]:
        return {name: vars(self)[name].tolist() for name in ("low", "high", "mean", "deviation")}

    @classmethod
    def from_reference(cls, counts: np.ndarray) -> SoftThreshold:
        """From histograms [k, bins] of a reference's responses."""
        low, high = np.array([_ramp(row) for row in counts]).reshape(-1, 2).T
        raw = cls(low, high, np.zeros(len(counts)), np.ones(len(counts)))
        q = raw(BIN_CENTRES[:, None].repeat(len(counts), 1)).T
        share = counts / counts.sum(1, keepdims=True)
        mean = (share * q).sum(1)
        deviation = np.sqrt(np.maximum(0.0, (share * q**2).sum(1) - mean**2))
        return cls(low, high, mean, np.maximum(deviation, _LEAST_DEVIATION))


def _ramp(counts: np.ndarray) -> tuple[float, float]:
    """Ends of the ramp: a quarter of the way in from the means of Otsu's two classes.

    Otsu's split maximises the variance between classes, n₀·n₁·(m₁ − m₀)². Where the scores do not differ, or too few
    responses for two classes, a response shows the behaviour if it is one standard deviation above their mean.
    """
    n0 = counts.cumsum()
    n1 = n0[-1] - n0
    sums = (counts * BIN_CENTRES).cumsum()
    allowed = (n0 >= _LEAST_CLASS) & (n1 >= _LEAST_CLASS)
    if not allowed.any():
        centre = sums[-1] / n0[-1]
        return centre + 0.5, centre + 1.5
    with np.errstate(divide="ignore", invalid="ignore"):
        below, above = sums / n0, (sums[-1] - sums) / n1
        between = np.where(allowed, n0 * n1 * (above - below) ** 2, -1.0)
    at = int(between.argmax())
    inward = _INWARD * (above[at] - below[at])
    return float(below[at] + inward), float(above[at] - inward)
