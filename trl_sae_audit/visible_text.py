"""Text that others wrote, made harmless where people look: on a page, in a terminal, in an error."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

LONGEST = 2000
_KEPT_CONTROLS = "\n\t"
_JOINERS = "\u200d\u200c\u00ad"
"""Invisible, but emoji and some scripts need them."""


def shown(text: str, longest: int = LONGEST) -> str:
    """`text` as a page can hold it: what would be invisible or turn the page around is written as its code point.

    Control characters, lone surrogates, marks that change the direction of writing and line separators become `⟨U+202E⟩`; what
    is beyond `longest` characters becomes a note of how much there is. Markup is the template's to escape.
    """
    rest = len(text) - longest
    if rest > 0:
        text = text[:longest]
    safe = visible(text)
    return f"{safe}… ({rest:,} more characters)" if rest > 0 else safe


def visible(text: str) -> str:
    """The same for a terminal, at any length: nothing in it moves the cursor, changes colours or rings a bell."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"⟨U+{ord(each):04X}⟩" if _is_harmful(each) else each for each in text)


def as_json(document: Any) -> str:
    """JSON to print: every letter as it is, but for those that `visible` would not show, which JSON can escape."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    return re.sub(r"[^ -~\n]", lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1] if _is_harmful(character) else character


def _is_harmful(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Cf", "Zl", "Zp") and character not in _KEPT_CONTROLS + _JOINERS
