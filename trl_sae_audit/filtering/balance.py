"""How much of each row is kept, so that the rest does not teach what was flagged: arrays in, arrays out."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

_ROUNDING = 1e-12


def kept_shares(score: np.ndarray) -> np.ndarray:
    """The share of rows like each one that stays, `min(1, exp(−c·s))`, with the c ≥ 0 for which what stays has mean score 0.

    Where s is the log-odds by which the flagged features explain the choice, rows of score s are exp(s) times as frequent as
    those of score −s. Keeping that share of them makes both equally frequent, at every size of s: what is kept says
    nothing about which answer was preferred, and the number of dropped rows is the excess of the one kind over the
    other. c is 1 then; it also calibrates a score of another unit or form.

    Args:
        score: of each row [n], none NaN; positive = what the flags object to.

    Returns:
        [n] in [0, 1]; 1 everywhere if the mean score is not above 0, and 0 at every positive score if none is below 0.
    """
    if score.sum() <= _ROUNDING * np.abs(score).sum():
        return np.ones(len(score))
    if (score >= 0).all():
        return (score == 0).astype(float)

    def shares(rate: float) -> np.ndarray:
        return np.exp(-rate * np.maximum(score, 0.0))

    unit = 1 / float(np.sqrt((score**2).mean()))
    high = unit
    while (score * shares(high)).sum() > 0:
        high *= 2
    return shares(float(brentq(lambda rate: (score * shares(rate)).sum(), 0.0, high, xtol=1e-12 * unit)))


def spread_evenly(expected: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Whole numbers in place of expected ones, in proportion along an order: systematic sampling without chance.

    The sum over any stretch of the order differs by less than 1 from what is expected of it.

    Args:
        expected: of each row [n], not negative.
        order: of the rows [n]; neighbours share what is left over.

    Returns:
        [n] int64.
    """
    reached = np.floor(np.cumsum(expected[order]) + 0.5 + _ROUNDING)
    found = np.empty(len(order), np.int64)
    found[order] = np.diff(reached, prepend=0.0).astype(np.int64)
    return found
