"""Lines over steps, as shapes for a stretchable SVG of 1000 × 100 units. Words and ticks are HTML beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .axes import SMALLEST, can_be_drawn
from .text import format_number

WIDTH, HEIGHT = 1000, 100
_MOST_POINTS = 160


@dataclass(frozen=True)
class Line:
    """One curve: ascending x [n], y [n], optionally the half width of its 95% interval [n], and the name of its style."""

    name: str
    x: np.ndarray
    y: np.ndarray
    margin: np.ndarray | None = None
    style: str = ""


@dataclass(frozen=True)
class Shape:
    """A drawn line: SVG path data of the curve and of the band around it."""

    name: str
    style: str
    path: str
    band: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Drawing:
    """A chart ready for the template. Positions of ticks are in percent from the left and from the top."""

    title: str
    unit: str
    shapes: list[Shape]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    zero: float
    description: str
    header: list[str]
    rows: list[list[str]]


def thin_line(line: Line, most: int = _MOST_POINTS) -> Line:
    """Reduce a line to at most `most` points, each the mean of consecutive ones. Margins combine as independent errors."""
    if len(line.x) <= most:
        return line
    pieces = np.array_split(np.arange(len(line.x)), most)
    x = np.array([line.x[piece].mean() for piece in pieces])
    y = np.array([line.y[piece].mean() for piece in pieces])
    margin = None
    if line.margin is not None:
        margin = np.array([np.sqrt(np.square(line.margin[piece]).sum()) / len(piece) for piece in pieces])
    return replace(line, x=x, y=y, margin=margin)


def draw(title: str, lines: Sequence[Line], unit: str = "", *, top: float | None = None) -> Drawing | None:
    """Draw some lines in one chart that includes zero. None if there is no finite point.

    Args:
        title: of the chart.
        lines: at most six.
        unit: of y.
        top: end of the y axis, for quantities with a natural maximum.
    """
    lines = [thin_line(_drop_what_cannot_be_drawn(line)) for line in lines]
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return None
    left, right = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    highs = [line.y if line.margin is None else line.y + line.margin for line in lines]
    lows = [line.y if line.margin is None else line.y - line.margin for line in lines]
    y_ticks = choose_ticks(
        min(0.0, *(low.min() for low in lows)), max(0.0, *(high.max() for high in highs)), 4
    )
    low, high = y_ticks[0], y_ticks[-1] if top is None else top
    x_ticks = [tick for tick in choose_ticks(left, right, 5, whole=True) if left <= tick <= right]

    def across(x: float) -> float:
        return WIDTH / 2 if right == left else WIDTH * (x - left) / (right - left)

    def down(y: float) -> float:
        return HEIGHT * (high - y) / (high - low)

    return Drawing(
        title,
        unit,
        [_draw_line(line, line.style or f"line-{place}", across, down) for place, line in enumerate(lines)],
        [(across(tick) / WIDTH * 100, f"{tick:,.0f}") for tick in x_ticks],
        [(down(tick), format_number(tick)) for tick in y_ticks if low <= tick <= high],
        down(0.0),
        "; ".join(_describe(line) for line in lines),
        ["step", *(line.name for line in lines)],
        _table(lines),
    )


def choose_ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them. Both can be drawn."""
    if not high - low > SMALLEST:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _drop_what_cannot_be_drawn(line: Line) -> Line:
    keep = can_be_drawn(line.x) & can_be_drawn(line.y)
    margin = None
    if line.margin is not None:
        margin = np.where(can_be_drawn(line.margin), line.margin, 0.0)[keep]
    return replace(line, x=np.asarray(line.x, float)[keep], y=np.asarray(line.y, float)[keep], margin=margin)


def _draw_line(
    line: Line, style: str, across: Callable[[float], float], down: Callable[[float], float]
) -> Shape:
    points = [(across(x), down(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = "M" + "L".join(f"{x:.1f} {y:.2f}" for x, y in points)
    band = ""
    if line.margin is not None and len(points) > 1:
        upper = [(across(x), down(y)) for x, y in zip(line.x, line.y + line.margin, strict=True)]
        lower = [(across(x), down(y)) for x, y in zip(line.x, line.y - line.margin, strict=True)]
        band = "M" + "L".join(f"{x:.1f} {y:.2f}" for x, y in [*upper, *reversed(lower)]) + "Z"
    return Shape(line.name, style, path, band, points if len(points) == 1 else [])


def _describe(line: Line) -> str:
    if len(line.x) == 1:
        return f"{line.name}: {format_number(line.y[0])} at step {line.x[0]:.0f}"
    return f"{line.name}: from {format_number(line.y[0])} at step {line.x[0]:.0f} to {format_number(line.y[-1])} at step {line.x[-1]:.0f}"


def _table(lines: Sequence[Line], most: int = 12) -> list[list[str]]:
    x = max((line.x for line in lines), key=len)
    chosen = x[np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(int))]
    return [
        [f"{step:.0f}", *(format_number(float(np.interp(step, line.x, line.y))) for line in lines)]
        for step in chosen
    ]
