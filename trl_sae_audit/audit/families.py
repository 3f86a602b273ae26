"""Families: features that fire together in the answers and that the data push the same way, so that one behaviour is one line.

A dictionary splits a behaviour over many features: a phrase, its beginning, its end. Over answers these are active together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from .gradients import ExampleArrays

CANDIDATES = 1024
"""Features in front that are sorted into families."""
CORRELATION = 0.3
"""Mean correlation over answers at which features and families are joined."""
LEAST = 8
"""Answers in which a feature must be active."""
_STANDARD_ERRORS = 3.0


class CoActivation:
    """Running sums of how some features are active together over answers: as many numbers as pairs of features, whatever the data.

    What is correlated is the root of the mean activation over an answer, as in the effect size: few very strong answers do not decide.

    Args:
        features: some features, no one twice.
        d_sae: of the dictionary.
    """

    def __init__(self, features: Sequence[int] | np.ndarray, d_sae: int) -> None:
        self._place = np.full(d_sae, -1)
        self._place[np.asarray(features, np.int64)] = np.arange(len(features))
        self._products = np.zeros((len(features), len(features)))
        self._sums, self._active = np.zeros((2, len(features)))
        self._answers = 0

    def add(self, arrays: ExampleArrays) -> None:
        """See some answers."""
        place = self._place[arrays.feature]
        kept = place >= 0
        owner = np.repeat(np.arange(arrays.side.size), np.diff(arrays.indptr))[kept]
        mean = arrays.mean[kept]
        table = np.zeros((arrays.side.size, len(self._sums)), np.float32)
        table[owner, place[kept]] = np.sign(mean) * np.sqrt(np.abs(mean))
        self._products += table.T @ table
        self._sums += table.sum(0, dtype=np.float64)
        self._active += (table != 0).sum(0)
        self._answers += arrays.side.size

    def correlation(self) -> np.ndarray:
        """Pearson's over answers [k, k]; NaN of a feature that is active in fewer than `LEAST` answers or the same in all."""
        mean = self._sums / max(self._answers, 1)
        covariance = self._products / max(self._answers, 1) - np.outer(mean, mean)
        spread = np.sqrt(np.maximum(np.diag(covariance), 0))
        known = (self._active >= LEAST) & (spread > 1e-6 * np.abs(mean))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = covariance / np.outer(spread, spread)
        found[~known], found[:, ~known] = np.nan, np.nan
        return found

    @property
    def threshold(self) -> float:
        """`CORRELATION`, or of few answers three standard errors of a correlation where there is none."""
        return max(CORRELATION, _STANDARD_ERRORS / max(self._answers, 1) ** 0.5)


def find_families(
    answers: Iterable[ExampleArrays], ranked: np.ndarray, signs: np.ndarray, d_sae: int
) -> np.ndarray:
    """The family of each feature in front, numbered from 1 in the order in which their first members are ranked; 0 of one alone.

    Args:
        answers: all of them, in parts.
        ranked: features, those in front first [k].
        signs: which way the data push each of them; 0 is no way, and in no family [k].
        d_sae: of the dictionary.

    Returns:
        [min(k, CANDIDATES)].
    """
    front, signs = ranked[:CANDIDATES], signs[:CANDIDATES]
    together = CoActivation(front, d_sae)
    for arrays in answers:
        together.add(arrays)
    correlation, group = together.correlation(), np.zeros(len(front), np.int64)
    for sign in (1, -1):
        which = np.flatnonzero((signs == sign) & np.isfinite(np.diag(correlation)))
        if len(which) > 1:
            own = join_correlated(correlation[np.ix_(which, which)], together.threshold)
            group[which] = own + group.max()
    return _number(group)


def join_correlated(correlation: np.ndarray, threshold: float) -> np.ndarray:
    """Groups from 1 by average linkage (SciPy's): two are joined while the mean correlation between their members is at least `threshold`."""
    distance = 1 - (correlation + correlation.T) / 2
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    return fcluster(tree, 1 - threshold, "distance").astype(np.int64)


def _number(group: np.ndarray) -> np.ndarray:
    """Groups of several numbered by their first member, the others 0."""
    counts = np.bincount(group)
    numbers = dict[int, int]()
    return np.array(
        [
            numbers.setdefault(each, len(numbers) + 1) if each and counts[each] > 1 else 0
            for each in group.tolist()
        ],
        np.int64,
    )
