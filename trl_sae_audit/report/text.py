"""Numbers, made readable; and `shown`, for text that others wrote."""

from __future__ import annotations

import math

from ..visible_text import LONGEST, shown

__all__ = ["LONGEST", "counted", "percent", "plain", "probability", "shown", "signed"]


def signed(value: float, digits: int = 3) -> str:
    """`value` with its sign and a true minus; 0 has none; "–" if it is not finite."""
    return plain(value, digits) if not value > 0 or math.isinf(value) else f"+{plain(value, digits)}"


def plain(value: float, digits: int = 3) -> str:
    """`value` with a true minus, no plus; "–" if it is not finite."""
    return "–" if not math.isfinite(value) else f"{value:.{digits}g}".replace("-", "−")


def probability(value: float) -> str:
    """A p- or q-value: two digits, and "<0.001" below that."""
    if not math.isfinite(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def percent(value: float) -> str:
    """A share: "12%", "0.8%"."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.2g}%"


def counted(number: int, one: str, many: str | None = None) -> str:
    """ "1 feature", "12 features"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
