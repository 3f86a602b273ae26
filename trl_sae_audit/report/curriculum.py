"""The curriculum map: when each feature moved, by one score, with features that move together next to each other."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

from .times import Timing, accumulate, find_timing

UP, DOWN, UNKNOWN = (33, 102, 172), (179, 88, 6), (128, 128, 128)
"""Blue and orange can be distinguished with every kind of colour vision."""
MOST_FEATURES = 200
_MOST_GROUPS = 8
_GAP = 1
_LEVELS = 126
_BLOCK = 65_536  # features looked at together, to bound memory


@dataclass(frozen=True)
class Group:
    """Features that move together.

    Attributes:
        name: A, B, …
        features: in the order of the map, from the top.
        start: its first row in the picture.
        direction: "up", "down" or "both ways".
        timing: when they moved.
        leading: up to three of its features, the largest change first.
    """

    name: str
    features: list[int]
    start: int
    direction: str
    timing: Timing
    leading: list[int]

    @property
    def rows(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Map:
    """The map.

    Attributes:
        groups: from the top.
        bins: (first, last) step of each column [bins, 2].
        values: mean score a step, or its level, [features, bins], in the groups' order, NaN where it is not known.
        height: rows of the picture, gaps between groups included.
        own_scale, one_scale: the picture as data URIs, with a colour scale per feature, or one for all.
        limit: the value shown in full colour in `one_scale`; larger ones look the same.
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


def draw_curriculum_map(
    means: np.ndarray,
    bins: np.ndarray,
    keep: Iterable[int] = (),
    most: int = MOST_FEATURES,
    *,
    level: bool = False,
) -> Map | None:
    """Draw the features that changed most over the run, in either direction. None before the second bin, or if nothing moved.

    Args:
        means: mean score a step, or its level at the end of each bin, [bins, F]; NaN where it is not known.
        bins: (first, last) step of each, [bins, 2].
        keep: features that are always shown.
        most: number of other features.
        level: whether `means` are levels, as of a drift, and not what adds up over the steps.
    """
    if len(bins) < 2:
        return None
    chosen = _choose_features(means, bins, level, keep, most)
    if not len(chosen):
        return None
    values = means[:, chosen].T
    changes = accumulate(values, bins, level=level)
    norms = np.linalg.norm(changes, axis=1, keepdims=True)
    profiles = changes / np.where(norms > 0, norms, 1.0)
    if len(chosen) == 1:
        order, cluster = np.zeros(1, int), np.ones(1, int)
    else:
        tree = linkage(profiles, method="ward", optimal_ordering=True)
        order = leaves_list(tree)
        cluster = fcluster(tree, min(_MOST_GROUPS, len(chosen)), "maxclust")
    values, changes, cluster, chosen = values[order], changes[order], cluster[order], chosen[order]
    starts = [0, *(np.flatnonzero(np.diff(cluster)) + 1).tolist(), len(chosen)]
    groups, top = [], 0
    for place, (first, last) in enumerate(pairwise(starts)):
        groups.append(_describe_group(chr(65 + place), chosen[first:last], changes[first:last], bins, top))
        top += last - first + _GAP
    sizes = np.abs(np.nan_to_num(values))
    limit = float(np.quantile(sizes, 0.995)) or float(sizes.max()) or 1.0
    largest = sizes.max(axis=1, keepdims=True)
    own = values / np.where(largest > 0, largest, 1.0)
    return Map(
        groups,
        bins,
        values,
        top - _GAP,
        _draw_picture(own, groups),
        _draw_picture(values / limit, groups),
        limit,
    )


def _describe_group(
    name: str, features: np.ndarray, changes: np.ndarray, bins: np.ndarray, top: int
) -> Group:
    ends = changes[:, -1]
    leading = features[np.argsort(-np.abs(ends), kind="stable")[:3]].tolist()
    return Group(name, features.tolist(), top, _name_direction(ends), find_timing(changes, bins), leading)


def describe_map(curriculum: Map, size: int) -> str:
    """Describe the map for readers who cannot see it."""
    first, last = int(curriculum.bins[0][0]), int(curriculum.bins[-1][1])
    return (
        f"{len(curriculum.features)} of {size:,} features over steps {first} to {last}, in "
        f"{len(curriculum.groups)} groups; the table below says what each group did."
    )


def _choose_features(
    means: np.ndarray, bins: np.ndarray, level: bool, keep: Iterable[int], most: int
) -> np.ndarray:
    """Those whose change was largest at any time."""
    blocks = (means[:, start : start + _BLOCK].T for start in range(0, means.shape[1], _BLOCK))
    size = np.concatenate([np.abs(accumulate(part, bins, level=level)).max(axis=1) for part in blocks])
    most = min(most, len(size))
    largest = np.argpartition(size, -most)[-most:]
    return np.unique(np.concatenate([largest[size[largest] > 0], np.fromiter(keep, dtype=np.int64)])).astype(
        int
    )


def _name_direction(ends: np.ndarray) -> str:
    up, down = ends[ends > 0].sum(), -ends[ends < 0].sum()
    if max(up, down) < 3 * min(up, down):
        return "both ways"
    return "up" if up > down else "down"


def _draw_picture(values: np.ndarray, groups: list[Group]) -> str:
    """Encode values from −1 to 1 as a PNG that is transparent at 0, so that it fits a light and a dark page."""
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
    png = encode_png(np.concatenate(blocks[:-1]), palette, [*ramp, *ramp[1:], 70])
    return "data:image/png;base64," + base64.b64encode(png).decode()


def encode_png(index: np.ndarray, palette: list[tuple[int, int, int]], alpha: list[int]) -> bytes:
    """Indexed colours [height, width] as a PNG file (ISO/IEC 15948)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = index.shape
    lines = np.zeros((height, width + 1), np.uint8)  # each line starts with its filter type: none
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
