"""What is printed: text and tables that fit 80 columns, or one JSON document; and nothing of the libraries."""

from __future__ import annotations

import codecs
import io
import logging
import math
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, OverflowMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from .text import sanitize, sanitize_json

Justify = Literal["left", "right", "center"]
_UNKNOWN = re.compile(r"[+-]?nan ?%?")
_UNKNOWN_INTERVAL = re.compile(r" \[[+-]?nan, [+-]?nan\]")
_NUMBER = re.compile(r"e[-+]?\d|nan|inf")
_NARROWEST = 8
"""A column of text is folded no further than to that many characters."""
_WORDS_LEAST, _WORDS_ROOM = 16, 32
"""A column of words is cut no further than to the first, and optional columns go until it has the second."""
_GAP = 2  # between columns

_REPLACED = "trl_sae_audit.replaced"
_LOOKALIKES = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "±": "+-", "×": "x", "·": ".", "…": "...", "’": "'", "‘": "'", "“": '"', "”": '"', "²": "2", "→": "->", "µ": "u", "μ": "u", "ρ": "rho", "√": "sqrt ", "≥": ">=", "≤": "<="}
)  # fmt: skip


def replace_unencodable() -> None:
    """Let no character end a command: what the terminal's encoding lacks is printed as what looks like it, or as `?`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_REPLACED)


def _replace_by_lookalike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_LOOKALIKES)
    return "".join(each if each.isascii() else "?" for each in text), error.end


codecs.register_error(_REPLACED, _replace_by_lookalike)


def make_printable(text: str) -> str:
    """`text` as standard output will show it: harmless, and in its encoding. A table measures this."""
    encoding = sys.stdout.encoding or "utf-8"
    return sanitize(text).encode(encoding, _REPLACED).decode(encoding)


def console(*, quiet: bool = False) -> Console:
    """For people: no colours where nobody looks, and square brackets are square brackets. `quiet` says nothing."""
    replace_unencodable()
    return Console(highlight=False, markup=False, emoji=False, quiet=quiet)


def table(
    title: str,
    columns: Mapping[str, Justify],
    rows: Iterable[Sequence[str | Text] | None],
    *,
    head: bool = True,
    words: str | None = None,
    optional: Sequence[str] = (),
) -> RenderableType:
    """A table in the one style of the commands. Where it is too wide its columns of text are folded; a number never is.

    Args:
        title: above it.
        columns: heading → the side that its cells are aligned to.
        rows: of cells, as many as there are columns; None draws a line.
        head: show the headings.
        words: heading of a column that gets the room that the others leave, its cells cut with an ellipsis.
        optional: headings of columns to omit, one after the other, where the words, or without words the others, have no room; a line
            below the table names them.
    """
    numeric = [justify == "right" for justify in columns.values()]
    printed = [
        None
        if cells is None
        else [_printable_cell(cell, number) for cell, number in zip(cells, numeric, strict=True)]
        for cells in rows
    ]
    headings = {make_printable(heading): justify for heading, justify in columns.items()}
    shown_words = None if words is None else make_printable(words)
    return Group(
        Text(make_printable(title), "bold"),
        _FittedTable(headings, printed, head, shown_words, tuple(map(make_printable, optional))),
        "",
    )


@dataclass
class _FittedTable:
    """A table made for the terminal it is printed on, and wider than that where it has to be: rich would cut numbers short."""

    columns: dict[str, Justify]
    rows: list[list[str | Text] | None]
    head: bool
    words: str | None
    optional: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = list(self.columns)
        omitted: list[str] = []
        for heading in self.optional:
            if self._fits(shown, options.max_width):
                break
            if heading in shown:
                shown.remove(heading)
                omitted.append(" ".join(heading.replace("-\n", "").split()))  # a hyphen there breaks a word
        room = self._room(shown, options.max_width)
        made = Table(
            box=SIMPLE_HEAD, show_header=self.head, show_edge=False, pad_edge=False, collapse_padding=True
        )
        for heading in shown:
            if heading == self.words and room is not None:
                width = min(max(_WORDS_LEAST, room), self._widest_words())
                cut: OverflowMethod = (
                    "ellipsis" if make_printable("…") == "…" else "crop"
                )  # what replaces it would be wider
                made.add_column(heading, no_wrap=True, overflow=cut, width=width)
            else:
                whole = self._is_whole(heading)
                text = _fold(heading, _width_of(self._cells(heading))) if whole else heading
                made.add_column(text, justify=self.columns[heading], no_wrap=whole, overflow="fold")
        places = [list(self.columns).index(heading) for heading in shown]
        for row in self.rows:
            if row is None:
                made.add_section()
            else:
                made.add_row(*(row[place] for place in places))
        yield from console.render(made, options.update_width(max(self._narrowest(shown), options.max_width)))
        if omitted:
            names = ", ".join(reversed(omitted))
            yield Sentence(f"Not shown in {options.max_width} columns: {names}.", "dim")

    def _cells(self, heading: str) -> list[str]:
        place = list(self.columns).index(heading)
        return [str(row[place]) for row in self.rows if row is not None]

    def _is_whole(self, heading: str) -> bool:
        return self.columns[heading] == "right" or all(map(_is_number, self._cells(heading)))

    def _width(self, heading: str) -> int:
        """What a column takes that is not folded."""
        cells = self._cells(heading)
        text = _fold(heading, _width_of(cells)) if self._is_whole(heading) else heading
        return _width_of([*cells, text if self.head else ""])

    def _room(self, shown: Sequence[str], width: int) -> int | None:
        """What the other columns leave to the words; None without a column of words."""
        if self.words is None:
            return None
        others = [heading for heading in shown if heading != self.words]
        return width - sum(self._width(heading) for heading in others) - _GAP * len(others)

    def _fits(self, shown: Sequence[str], width: int) -> bool:
        """Whether the words have room, or without words whether all columns have."""
        room = self._room(shown, width)
        if room is None:
            return self._narrowest(shown) <= width
        return room >= min(_WORDS_ROOM, self._widest_words())

    def _widest_words(self) -> int:
        assert self.words is not None
        return _width_of([*self._cells(self.words), self.words])

    def _narrowest(self, shown: Sequence[str]) -> int:
        widths = [
            min(self._widest_words(), _WORDS_LEAST)
            if heading == self.words
            else self._width(heading)
            if self._is_whole(heading)
            else min(self._width(heading), _NARROWEST)
            for heading in shown
        ]
        return sum(widths) + _GAP * (len(shown) - 1)


def _width_of(cells: Iterable[str]) -> int:
    return max((cell_len(line) for cell in cells for line in cell.splitlines()), default=0)


def _is_number(cell: str) -> bool:
    return not any(character.isalpha() for character in _NUMBER.sub("", cell))


def _fold(heading: str, width: int) -> str:
    return "\n".join(
        textwrap.fill(line, max(width, 1), break_long_words=False) for line in heading.splitlines()
    )


def _printable_cell(cell: str | Text, number: bool) -> str | Text:
    """What can be printed of a cell; of a number that is not known a dash."""
    text = cell if isinstance(cell, str) else cell.plain
    if number:
        text = _UNKNOWN_INTERVAL.sub("", text)
        text = "–" if _UNKNOWN.fullmatch(text) else text
    text = make_printable(text)
    return text if isinstance(cell, str) else Text(text, cell.style)


def single_line(line: str) -> RenderableType:
    """A command or a path, which stays on one line however long it is."""
    return Group(
        Text(make_printable(line), no_wrap=True, overflow="ignore")
    )  # a Text by itself loses no_wrap in Console.print


@dataclass
class Sentence:
    """Text that is wrapped between words, and never between a number and what belongs to it: `-0.051 ± 0.05`, `95 %`, `q < 0.05`."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        held = Text(_INSIDE.sub(_HELD, make_printable(self.text)))
        for line in held.wrap(console, options.max_width):
            yield Text(line.plain.rstrip().replace(_HELD, " "), self.style, no_wrap=True, overflow="ignore")


_HELD = "\ue000"  # no space to rich, and one column wide
_INSIDE = re.compile(
    r"(?<=\d) (?=%|±|\+-)|(?<=[±]) (?=[\d.])|(?<=\d \+-) (?=[\d.])|(?<=[\w)]) (?=[<>=≤≥] [-+.\d])|(?<=[<>=≤≥]) (?=[-+.\d])|(?<=\d,) (?=[-+.\de]+\])"
)


def to_json(document: Mapping[str, Any]) -> str:
    """`document` as JSON. NaN and infinities, which JSON does not know, become null."""
    return sanitize_json(_json_value(document), sys.stdout.encoding or "utf-8")


def _json_value(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _json_value(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return _json_value(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _SanitizingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return sanitize(super().format(record))


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence the libraries' advice, and their progress bars if standard error is not a terminal.

    To be entered before they are imported, since most of them read these settings once. What this package warns of
    is shown, one line each. Settings that the user made win.
    """
    settings = {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
    if not sys.stderr.isatty():
        bars = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
        settings |= dict.fromkeys(bars, "1")
    made = {name: value for name, value in settings.items() if name not in os.environ}
    ours = logging.getLogger(__package__)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SanitizingFormatter("trl-sae-audit: warning: %(message)s"))
    propagates = ours.propagate
    trl = logging.getLogger("trl")  # has no setting of its own
    level = trl.level
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=__package__)
        os.environ.update(made)
        ours.addHandler(handler)
        ours.propagate = False
        if level == logging.NOTSET:
            trl.setLevel(logging.ERROR)
        try:
            yield
        finally:
            ours.propagate = propagates
            ours.removeHandler(handler)
            trl.setLevel(level)
            for name in made:
                del os.environ[name]
