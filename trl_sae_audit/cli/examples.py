"""Answers before and after in the terminal: short parts of those where two checkpoints differ most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..console import table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..verification.samples import Samples

_LONGEST = 5000
_LONGEST_EXCERPT = 130
_LONGEST_WORDS = 28
_NAMED = 3


def sample_rows(samples: Samples | None, longest: int = _LONGEST) -> list[dict[str, Any]]:
    """The answers before and after, those first that changed most: prompt, change, before, after, with «» around marked words."""
    from ..report.rollouts import mark_excerpt, pair_rollouts

    if samples is None:
        return []
    reader = pair_rollouts(samples.dictionary, list(samples.features), samples.rollouts)
    return [
        {
            "prompt": pair.after.prompt,
            "change": pair.change,
            "before": mark_excerpt(pair.before, longest),
            "after": mark_excerpt(pair.after, longest),
        }
        for pair in (reader.pairs if reader else ())
        if pair.before and pair.after
    ]


def examples_of(samples: Samples | None, words: Mapping[int, str], most: int) -> list[RenderableType]:
    """A table of the first of these answers, `most` of them, and what is marked in words; nothing where there are none."""
    rows: list[list[str] | None] = []
    for row in sample_rows(samples, _LONGEST_EXCERPT)[:most]:
        prompt = " ".join(row["prompt"].split())
        rows += [None] if rows else []
        rows += [["prompt", f"{'…' if len(prompt) > _LONGEST_EXCERPT else ''}{prompt[-_LONGEST_EXCERPT:]}"]]
        rows += [[side, row[side] or "–"] for side in ("before", "after")]
    if samples is None or not rows:
        return []
    named = [_name(feature, words.get(feature, "")) for feature in samples.features[:_NAMED]]
    others = len(samples.features) - len(named)
    marked = ", ".join(named) + (f" and {others} more" if others else "")
    title = f"Where the answers differ most; «» where it shows {marked}"
    return [table(title, {"of": "left", "text": "left"}, rows, head=False)]


def _name(feature: int, words: str) -> str:
    short = words if len(words) <= _LONGEST_WORDS else f"{words[: _LONGEST_WORDS - 1].rstrip()}…"
    return f"{feature} ({short})" if short else str(feature)
