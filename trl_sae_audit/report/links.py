"""Features named in a sentence become links to their cards."""

from __future__ import annotations

import re
from collections.abc import Mapping

from markupsafe import Markup, escape

from ..text import sanitize, sanitize_excerpt
from .sentences import name_feature


def link_features(
    text: str, watched: Mapping[str, int], dictionary: int = 0, *, brief: bool = False
) -> Markup:
    """The text as markup, with a link where a sentence names a feature as `name_feature` does.

    Args:
        text: plain.
        watched: label → feature, for features that go by their label alone.
        dictionary: number of the page's dictionary that they belong to.
        brief: hide the number after a label or words.
    """
    text = sanitize(text)
    by_name = {name_feature(feature, sanitize_excerpt(label, 80)): feature for label, feature in watched.items()}  # fmt: skip
    names = [re.escape(name) for name in sorted(by_name, key=len, reverse=True)]
    found = re.compile("|".join([*names, r"(?:“[^“”]*” \()?\b[Ff]eature (\d+)\b\)?"]))
    parts, last = [], 0
    for match in found.finditer(text):
        name = match[0]
        if name.endswith(")") and "(" not in name:
            name = name[:-1]
        feature = by_name[name] if name in by_name else int(match[1])
        parts += [_held(text[last : match.start()]), _link(dictionary, feature, name, brief)]
        last = match.start() + len(name)
    return Markup("").join([*parts, _held(text[last:])])


_INSIDE = re.compile(r" (?=[±<] ?[\d.])|(?<=[±<]) (?=[\d.])")
"""Spaces at which no line is broken: `+0.3 ± 0.1`, `q < 0.05`."""


def _held(text: str) -> Markup:
    return escape(_INSIDE.sub("\u00a0", text))


def _link(dictionary: int, feature: int, name: str, brief: bool) -> Markup:
    label, middle, number = name.rpartition(" (")
    shown: str = name
    if brief and middle:
        shown = Markup('{}<span class="hide"> ({}</span>').format(label, number)
    return Markup('<a class="open" href="#feature-{}-{}">{}</a>').format(dictionary, feature, shown)
