"""How far a long computation is and how long it will still take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS_A_LINE = 15.0


class _Lines:
    """A stream in which a bar that is drawn again becomes a new line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text.replace("\r", "\n").lstrip("\n") + "\n" if text.strip() else "")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(steps: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A tqdm bar with tqdm's options; where standard error is no terminal, a line every fifteen seconds."""
    if sys.stderr.isatty():
        return tqdm(steps, **options)
    lines: dict[str, Any] = {
        "file": _Lines(sys.stderr),
        "mininterval": _SECONDS_A_LINE,
        "maxinterval": _SECONDS_A_LINE,
        "miniters": 1,
        "delay": _SECONDS_A_LINE / 3,
        "ascii": True,
        "ncols": 78,
        "disable": False,  # also where TQDM_DISABLE silences the bars of libraries
    }
    return tqdm(steps, **lines, **options)
