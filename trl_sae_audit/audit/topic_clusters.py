"""Prompts sorted into clusters by their states: SciPy's k-means, the number of clusters by the silhouette."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from scipy.cluster.vq import kmeans2, vq
from scipy.spatial.distance import cdist

NUMBERS = (4, 6, 8, 12, 16)
"""Numbers of clusters that are tried."""
LEAST = 40
"""Prompts of a cluster, on average, at least: with fewer a topic has too little to compare."""
SAMPLE = 4096
"""Prompts, evenly drawn, on which the clusters are found; the others go to the nearest."""
_COMPONENTS = 16
_JUDGED = 1024  # prompts by which the number of clusters is chosen
_STARTS = 4


class Clusters:
    """Clusters found in a sample of states, and where other states belong.

    States are centred, each of their numbers scaled to unit spread (a few dimensions of a residual stream are a thousand times as large
    as the others), and taken along the sample's first 16 principal components. Of the numbers of clusters in `NUMBERS` that leave
    `LEAST` prompts a cluster, the one with the largest mean silhouette is taken (Rousseeuw 1987).

    Args:
        states: of the sample [n, numbers], at least `NUMBERS[0] · LEAST` of them.
        seed: of k-means' starts.
    """

    def __init__(self, states: np.ndarray, seed: int = 0) -> None:
        sample = states.astype(np.float64)
        spread = sample.std(0)
        self._mean, self._scale = sample.mean(0), np.where(spread > 0, spread, 1.0)
        scaled = (sample - self._mean) / self._scale
        _, _, axes = np.linalg.svd(scaled, full_matrices=False)
        self._axes = axes[:_COMPONENTS].T
        points = scaled @ self._axes
        judged = points[np.linspace(0, len(points) - 1, min(len(points), _JUDGED)).astype(np.int64)]
        found = [_k_means(points, k, seed) for k in NUMBERS if len(points) >= k * LEAST]
        if not found:
            raise ValueError(f"{len(points)} prompts are too few for clusters")
        self.centres = max(found, key=lambda centres: mean_silhouette(judged, vq(judged, centres)[0]))

    def assign(self, states: np.ndarray) -> np.ndarray:
        """Number of the nearest cluster of each state [n]."""
        return vq(((states - self._mean) / self._scale) @ self._axes, self.centres)[0]


def enough_for_clusters(prompts: int) -> bool:
    """Whether clusters can be found in so many prompts."""
    return prompts >= NUMBERS[0] * LEAST


def draw_sample(states: Iterable[np.ndarray], total: int) -> np.ndarray:
    """At most `SAMPLE` of `total` states that come in parts, evenly spaced."""
    wanted = np.linspace(0, total - 1, min(total, SAMPLE)).astype(np.int64)
    return np.concatenate(list(_picked(states, wanted)))


def _picked(states: Iterable[np.ndarray], wanted: np.ndarray) -> Iterator[np.ndarray]:
    first = 0
    for part in states:
        here = wanted[(wanted >= first) & (wanted < first + len(part))]
        yield part[here - first]
        first += len(part)


def mean_silhouette(points: np.ndarray, cluster: np.ndarray) -> float:
    """Mean over points of `(b − a) / max(a, b)`: a the mean distance to the others of its cluster, b to those of the nearest other one;
    0 of a point alone in its cluster (Rousseeuw 1987).

    Args:
        points: [n, dimensions].
        cluster: of each [n].
    """
    numbers, place, counts = np.unique(cluster, return_inverse=True, return_counts=True)
    if len(numbers) < 2:
        return -1.0
    member = np.eye(len(numbers))[place]
    sums = cdist(points, points) @ member
    own = np.take_along_axis(sums, place[:, None], 1)[:, 0] / np.maximum(counts[place] - 1, 1)
    others = np.where(member > 0, np.inf, sums / counts).min(1)
    width = np.maximum(own, others)
    score = np.divide(others - own, width, out=np.zeros_like(own), where=width > 0)
    return float(np.where(counts[place] > 1, score, 0.0).mean())


def _k_means(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Centres of the best of some starts, without those that no point belongs to."""
    found = []
    for start in range(_STARTS):
        centres, _ = kmeans2(
            points, k, iter=50, minit="++", missing="warn", rng=np.random.default_rng([seed, k, start])
        )
        number, distance = vq(points, centres)
        found.append((float((distance**2).sum()), centres[np.unique(number)]))
    return min(found, key=lambda each: each[0])[1]
