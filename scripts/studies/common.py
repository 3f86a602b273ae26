"""What the studies share: the loop over cells, tables and figures that say which command made them.

A study is one command. It writes its raw numbers as it goes (`runs/studies/NAME.jsonl`, a line a cell, so that a stopped
study goes on where it was) and ends with `docs/studies/NAME.md` and figures beside it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "studies"
RAW = ROOT / "runs" / "studies"

Cell = dict[str, Any]


def run_cells(
    name: str, cells: Iterable[Cell], run: Callable[[Cell], Iterable[dict[str, Any]]]
) -> pd.DataFrame:
    """Run every cell that has no result yet, and return the rows of all of them.

    Args:
        name: of the study; the rows are kept in `runs/studies/NAME.jsonl`.
        cells: settings, as JSON can hold them; they decide whether a stored row counts.
        run: cell → its result rows, each joined with the cell's own settings.
    """
    path = RAW / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored: list[dict[str, Any]] = []
    if path.exists():
        stored = [json.loads(line) for line in path.read_text().splitlines()]
    done = {_key(entry["cell"]): entry["rows"] for entry in stored}
    wanted = list(cells)
    for cell in tqdm(wanted, desc=name, unit="cell"):
        if _key(cell) in done:
            continue
        rows = list(run(cell))
        with path.open("a") as file:
            file.write(json.dumps({"cell": cell, "rows": rows}) + "\n")
        done[_key(cell)] = rows
    return pd.DataFrame([{**cell, **row} for cell in wanted for row in done[_key(cell)]])


def write_report(name: str, title: str, sections: Iterable[str]) -> Path:
    """Write `docs/studies/NAME.md`: the title, the command that was run, and the sections."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    command = shlex.join(["python", str(script), *sys.argv[1:]])
    path = RESULTS / f"{name}.md"
    path.write_text("\n\n".join([f"# {title}", f"Made by `{command}`.", *sections]) + "\n")
    print(f"wrote {path}")
    return path


def markdown_table(frame: pd.DataFrame) -> str:
    """The columns of a frame as a Markdown table; format numbers before."""
    header = [str(column) for column in frame.columns]
    rows = [[str(value) for value in row] for row in frame.itertuples(index=False)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def new_figure(columns: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Figure, list[Any]]:
    """A figure of axes side by side, in the studies' common style."""
    pyplot.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 9,
            "svg.fonttype": "none",
            "svg.hashsalt": "trl-sae-audit",
        }
    )
    figure, axes = pyplot.subplots(
        1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False
    )
    return figure, list(axes[0])


def save_figure(figure: Figure, name: str, text: str) -> str:
    """Save `docs/studies/NAME.svg`; returns the Markdown that shows it, with `text` for who cannot see it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
    return f"![{text}]({name}.svg)"


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)
