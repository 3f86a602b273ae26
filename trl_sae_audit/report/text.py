"""Text that others wrote, made harmless and readable; numbers, made readable."""

from __future__ import annotations

import math
import unicodedata

LONGEST = 2000
_KEPT_CONTROLS = "\n\t"


def shown(text: str, longest: int = LONGEST) -> str:
    """`text` as a page can hold it: what would be invisible or turn the page around is written as its code point.

    Control characters, lone surrogates, marks that change the direction of writing and line separators become `⟨U+202E⟩`; what
    is beyond `longest` characters becomes a note of how much there is. Markup is the template's to escape.
    """
    rest = len(text) - longest
    if rest > 0:
        text = text[:longest]
    safe = "".join(_visible(character) for character in text)
    return f"{safe}… ({rest:,} more characters)" if rest > 0 else safe


def _visible(character: str) -> str:
    if character in _KEPT_CONTROLS:
        return character
    category = unicodedata.category(character)
    if category in ("Cc", "Cs", "Cf", "Zl", "Zp") and character not in "\u200d\u200c\u00ad":
        return f"⟨U+{ord(character):04X}⟩"
    return character


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
