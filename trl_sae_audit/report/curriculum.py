"""The curriculum map: what was asked for when, features that move together side by side."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

UP, DOWN, UNKNOWN = (33, 102, 172), (179, 88, 6), (128, 128, 128)
"""Blue and orange, which every kind of colour vision tells apart."""
MOST_FEATURES = 200
_MOST_GROUPS = 8
_GAP = 1
_LEVELS = 126


@dataclass(frozen=True)
class Group:
    """Features that move together.

    Attributes:
        name: A, B, …
        features: from the top of the map down.
        start: its first row in the picture; rows: how many.
        direction: "up", "down" or "both ways".
        when: "early", "late" or "throughout".
    """

    name: str
    features: list[int]
    start: int
    direction: str
    when: str

    @property
    def rows(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Map:
    """The map.

    Attributes:
        groups: from the top down.
        bins: (first, last) step of each column [bins, 2].
        values: mean attribution a step [features, bins], in the groups' order, NaN where no step was finite.
        height: rows of the picture, gaps between groups included.
        own_scale, one_scale: the picture as data URIs: each feature by its own largest value; all by one.
        limit: the value that has the full colour in `one_scale`; larger ones are shown as large.
    """

    groups: list[Group]
    bins: np.ndarray
    values: np.ndarray
    height: int
    own_scale: str
    one_scale: str
    limit: float

    @property
    def features(self) -> list[int]:
        return [feature for group in self.groups for feature in group.features]


def curriculum_map(
    means: np.ndarray, bins: np.ndarray, keep: Iterable[int] = (), most: int = MOST_FEATURES
) -> Map | None:
    """The map of the features with the most attribution over the run, in either direction; None before the second bin, or where nothing moved.

    Args:
        means: mean attribution a step, [bins, F]; NaN where no step was finite.
        bins: (first, last) step of each, [bins, 2].
        keep: features that are on it whatever their size.
        most: features on it besides.
    """
    if len(bins) < 2:
        return None
    chosen = _chosen(means, keep, most)
    if not len(chosen):
        return None
    values = means[:, chosen].T
    profiles = np.nan_to_num(values)
    norms = np.linalg.norm(profiles, axis=1, keepdims=True)
    profiles = profiles / np.where(norms > 0, norms, 1.0)
    if len(chosen) == 1:
        order, cluster = np.zeros(1, int), np.ones(1, int)
    else:
        tree = linkage(profiles, method="ward", optimal_ordering=True)
        order = leaves_list(tree)
        cluster = fcluster(tree, min(_MOST_GROUPS, len(chosen)), "maxclust")
    values, cluster, chosen = values[order], cluster[order], chosen[order]
    starts = [0, *(np.flatnonzero(np.diff(cluster)) + 1).tolist(), len(chosen)]
    groups, top = [], 0
    for place, (first, last) in enumerate(pairwise(starts)):
        rows = np.nan_to_num(values[first:last])
        groups.append(Group(chr(65 + place), chosen[first:last].tolist(), top, _direction(rows), _when(rows)))
        top += last - first + _GAP
    sizes = np.abs(np.nan_to_num(values))
    limit = float(np.quantile(sizes, 0.995)) or float(sizes.max()) or 1.0
    largest = sizes.max(axis=1, keepdims=True)
    own = values / np.where(largest > 0, largest, 1.0)
    return Map(
        groups, bins, values, top - _GAP, _picture(own, groups), _picture(values / limit, groups), limit
    )


def map_note(found: Map, size: int) -> str:
    """What the map shows, for whoever cannot see it."""
    first, last = int(found.bins[0][0]), int(found.bins[-1][1])
    return (
        f"{len(found.features)} of {size:,} features over steps {first} to {last}, in "
        f"{len(found.groups)} groups; the table below says what each group did."
    )


def _chosen(means: np.ndarray, keep: Iterable[int], most: int) -> np.ndarray:
    size = np.abs(np.nan_to_num(means)).sum(axis=0)
    most = min(most, len(size))
    largest = np.argpartition(size, -most)[-most:]
    return np.unique(np.concatenate([largest[size[largest] > 0], np.fromiter(keep, dtype=np.int64)])).astype(
        int
    )


def _direction(rows: np.ndarray) -> str:
    up, down = rows[rows > 0].sum(), -rows[rows < 0].sum()
    if max(up, down) < 3 * min(up, down):
        return "both ways"
    return "up" if up > down else "down"


def _when(rows: np.ndarray) -> str:
    size = np.abs(rows).sum(axis=0)
    third = max(1, round(len(size) / 3))
    share = size / (size.sum() or 1.0)
    even = third / len(size)
    if share[:third].sum() > even + 0.15:
        return "early"
    return "late" if share[-third:].sum() > even + 0.15 else "throughout"


def _picture(values: np.ndarray, groups: list[Group]) -> str:
    """Values from −1 to 1 as a PNG whose colours fade to nothing at 0, so that it fits a light and a dark page."""
    level = np.rint(np.clip(np.nan_to_num(values), -1, 1) * _LEVELS).astype(int)
    index = np.where(level >= 0, level, _LEVELS - level)
    index[np.isnan(values)] = 2 * _LEVELS + 1
    gap = np.zeros((_GAP, values.shape[1]), int)
    blocks, start = [], 0
    for group in groups:
        blocks += [index[start : start + group.rows], gap]
        start += group.rows
    ramp = [round(255 * step / _LEVELS) for step in range(_LEVELS + 1)]
    palette = [UP] * (_LEVELS + 1) + [DOWN] * _LEVELS + [UNKNOWN]
    png = png_bytes(np.concatenate(blocks[:-1]), palette, [*ramp, *ramp[1:], 70])
    return "data:image/png;base64," + base64.b64encode(png).decode()


def png_bytes(index: np.ndarray, palette: list[tuple[int, int, int]], alpha: list[int]) -> bytes:
    """Indexed colours [height, width] as a PNG file (ISO/IEC 15948)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = index.shape
    lines = np.zeros((height, width + 1), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = index
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"PLTE", bytes(value for colour in palette for value in colour)),
            chunk(b"tRNS", bytes(alpha)),
            chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            chunk(b"IEND", b""),
        ]
    )
