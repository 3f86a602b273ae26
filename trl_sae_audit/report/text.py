"""Formatting of numbers for readers."""

from __future__ import annotations

import math


def format_signed(value: float, digits: int = 3, *, padded: bool = False) -> str:
    """`value` with its sign and a true minus; no sign for 0; "–" if it is not finite. `padded`: as in `format_number`."""
    plus = "+" if value > 0 and not math.isinf(value) else ""
    return plus + format_number(value, digits, padded=padded)


def format_number(value: float, digits: int = 3, *, padded: bool = False) -> str:
    """`value` with a true minus and no plus; "–" if it is not finite. `padded`: all digits, zeros at the end too, as in a column."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:#.{digits}g}".rstrip(".") if padded and value else f"{value:.{digits}g}"
    return text.replace("-", "−")


def format_probability(value: float) -> str:
    """A p- or q-value: two digits, and "<0.001" below that."""
    if not math.isfinite(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def format_percent(value: float) -> str:
    """A share: "12%", "0.8%"."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.2g}%"


def format_count(number: int, one: str, many: str | None = None) -> str:
    """ "1 feature", "12 features"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def describe_ceiling(ceiling: float, best: float) -> str:
    """What a perfect score would explain, as far as it can be told from sampling noise.

    Args:
        ceiling: R² to expect of a perfect score.
        best: the largest R² of the scores.
    """
    if ceiling > best:
        return f"a perfect score would explain {format_percent(ceiling)}"
    if ceiling > best / 2:
        return f"about all that can be told from noise on so many prompts, {format_percent(ceiling)}"
    return "most of the change is sampling noise, so what a perfect score would explain cannot be told; measure on more prompts"
