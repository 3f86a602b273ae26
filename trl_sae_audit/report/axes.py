"""Axes: a power of ten that makes numbers readable, and where on an axis a value and its interval lie."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

LARGEST, SMALLEST = 1e100, 1e-100
"""No quantity of ours lies beyond them, and an axis that includes such a number overflows."""


def can_be_drawn(values: ArrayLike) -> np.ndarray:
    """Which numbers have a place on an axis: the finite ones that do not overflow it."""
    return np.abs(np.asarray(values, float)) < LARGEST  # False for NaN


def find_reach(ends: Iterable[float]) -> float:
    """How far an axis with zero in its middle reaches on either side, so that all ends of intervals have a place on it."""
    sizes = np.abs(np.fromiter(ends, float))
    return float(sizes[can_be_drawn(sizes)].max(initial=0.0)) or 1.0


@dataclass(frozen=True)
class Scale:
    """A power of ten that makes a column readable: values are shown times `factor`, and `unit` says so."""

    factor: float
    unit: str

    @classmethod
    def of(cls, values: np.ndarray) -> Scale:
        largest = float(np.abs(values[can_be_drawn(values)]).max(initial=0.0))
        if largest < SMALLEST or 0.1 <= largest < 1000:
            return cls(1.0, "")
        power = math.floor(math.log10(largest))
        return cls(10.0**-power, f" ×10{_superscript(power)}")

    def __call__(self, value: float) -> float:
        return value * self.factor


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@dataclass(frozen=True)
class Whisker:
    """A value and its interval, in percent of an axis' width."""

    low: float
    middle: float
    high: float
    zero: float

    @classmethod
    def on(cls, axis: tuple[float, float], value: float, margin: float) -> Whisker:
        margin = margin if math.isfinite(margin) else 0.0
        return cls.between(axis, value - margin, value, value + margin)

    @classmethod
    def between(cls, axis: tuple[float, float], low: float, value: float, high: float) -> Whisker:
        start, end = axis

        def place(x: float) -> float:
            return round(100 * min(1.0, max(0.0, (x - start) / (end - start))), 2)

        return cls(place(low), place(value), place(high), place(0.0))
