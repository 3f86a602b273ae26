"""What the commands print: text and tables that fit 80 columns, or one JSON document; and nothing of the libraries.

A command collects its figures in one mapping, makes text and tables of it, and gives both to `OutputArguments.show`;
results go to standard output, everything else to standard error. `quiet` is around every command already.

```python
output.show({"examples": n, "top": rows}, table("Title", {"feature": "right"}, cells), "A sentence.", to_copy("cd runs"))
```
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import visible_text
from .visible_text import visible

Justify = Literal["left", "right", "center"]


@dataclass
class OutputArguments:
    """How the result is shown."""

    json: bool = field(
        default=False, metadata={"help": "Print one JSON document for programs instead of text and tables."}
    )

    def show(self, document: Mapping[str, Any], *parts: RenderableType) -> None:
        """Print the result: `document` where --json was given, else `parts`, one below the other."""
        if self.json:
            print(as_json(document))
        else:
            stdout = console()
            for part in parts:
                stdout.print(visible(part) if isinstance(part, str) else part, crop=False)


def console(*, quiet: bool = False) -> Console:
    """For people: no colours where nobody looks, and square brackets are square brackets. `quiet` says nothing."""
    return Console(highlight=False, markup=False, emoji=False, quiet=quiet)


def table(
    title: str, columns: Mapping[str, Justify], rows: Iterable[Sequence[str | Text]], *, head: bool = True
) -> Table:
    """A table in the one style of the commands. Long cells are folded, so that it fits the terminal's width.

    Args:
        title: above it.
        columns: heading → where its cells stand.
        rows: of cells, as many as there are columns.
        head: show the headings.
    """
    made = Table(
        title=visible(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=head
    )
    for heading, justify in columns.items():
        made.add_column(heading, justify=justify, overflow="fold")
    for cells in rows:
        made.add_row(*(_harmless(cell) for cell in cells))
    return made


def _harmless(cell: str | Text) -> str | Text:
    return visible(cell) if isinstance(cell, str) else Text(visible(cell.plain), cell.style)


def to_copy(line: str) -> RenderableType:
    """A command or a path, which stays on one line however long it is."""
    return Group(
        Text(visible(line), no_wrap=True, overflow="ignore")
    )  # a Text by itself loses no_wrap in Console.print


def as_json(document: Mapping[str, Any]) -> str:
    """`document` as JSON. NaN and infinities, which JSON does not know, become null."""
    return visible_text.as_json(_plain(document))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries keep their advice to themselves, and their progress bars where standard error is no terminal.

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
    handler.setFormatter(_Visible("trl-sae-audit: warning: %(message)s"))
    propagates = ours.propagate
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=__package__)
        os.environ.update(made)
        ours.addHandler(handler)
        ours.propagate = False
        try:
            yield
        finally:
            ours.propagate = propagates
            ours.removeHandler(handler)
            for name in made:
                del os.environ[name]
