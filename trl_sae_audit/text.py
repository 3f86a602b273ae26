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


def sanitize(text: str) -> str:
    """`text` with nothing in it that moves a cursor, changes colours, rings a bell, or turns the writing around.

    Control characters, lone surrogates, marks that change the direction of writing and line separators become `⟨U+202E⟩`.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"⟨U+{ord(each):04X}⟩" if _is_harmful(each) else each for each in text)


def sanitize_excerpt(text: str, longest: int = LONGEST) -> str:
    """At most `longest` characters of it, then a note of how many more there are. Markup is a page's to escape."""
    rest = len(text) - longest
    return f"{sanitize(text[:longest])}… ({rest:,} more characters)" if rest > 0 else sanitize(text)


def sanitize_json(document: Any, encoding: str = "utf-8") -> str:
    """JSON to print: every letter as it is, but for harmful ones and those that the encoding lacks, which JSON can escape."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"[^ -~\n]", lambda match: _escape(match[0]) if _is_harmful(match[0]) else match[0], text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(document, indent=2, allow_nan=False)
    return text


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1]


def _is_harmful(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Cf", "Zl", "Zp") and character not in _KEPT_CONTROLS + _JOINERS
