"""What the studies share: the loop over cells, tables and figures that say which command made them.

A study is one command. It writes its raw numbers as it goes (`runs/studies/NAME.jsonl`, a line a cell, so that a stopped
study goes on where it was) and ends with its part of a page in `docs/studies` and figures beside it.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure
from scipy import stats
from tqdm.auto import tqdm

from trl_sae_audit.statistics import Interval

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
    done = {_key(entry["cell"]): entry["rows"] for entry in _stored(path)}
    wanted = list(cells)
    for cell in tqdm(wanted, desc=name, unit="cell"):
        if _key(cell) in done:
            continue
        rows = list(run(cell))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": cell, "rows": rows}) + "\n")
        done[_key(cell)] = rows
    return pd.DataFrame([{**cell, **row} for cell in wanted for row in done[_key(cell)]])


def stored_cells(name: str) -> pd.DataFrame:
    """The rows of all cells of a study that have ever finished, each joined with its cell's settings."""
    return pd.DataFrame(
        [{**entry["cell"], **row} for entry in _stored(RAW / f"{name}.jsonl") for row in entry["rows"]]
    )


def bootstrap_interval(
    sample: np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean, draws: int = 2000
) -> Interval:
    """95 % percentile bootstrap of a statistic over the rows of a sample, which must be the independent units.

    With few rows it is too narrow: five seeds cover about 85 % instead of 95 %.
    """
    estimate = float(statistic(sample))
    if len(sample) == 1:
        return Interval(estimate, estimate, estimate)
    found = stats.bootstrap(
        (np.arange(len(sample)),),
        lambda rows: statistic(sample[rows]),
        vectorized=False,
        n_resamples=draws,
        method="percentile",
        rng=0,
    ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high))


def write_report(name: str, title: str, sections: Iterable[str], page: str | None = None) -> Path:
    """Write what a study found into its part of `docs/studies/PAGE.md`; the rest of the page, written by hand, stays.

    Args:
        name: of the study or variant; its part of the page is between `<!-- made: NAME -->` and `<!-- end: NAME -->`.
        title: of the part, and of the page where there is none yet.
        sections: paragraphs, tables and headings, which become one level deeper.
        page: which page answers the study's question; by default one of the study's own name.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    command = shlex.join(["python", str(script), *sys.argv[1:]])
    path = RESULTS / f"{page or name}.md"
    begin, end = f"<!-- made: {name} -->", f"<!-- end: {name} -->"
    body = [re.sub(r"^##", "###", section, flags=re.MULTILINE) for section in sections]
    part = "\n\n".join([begin, f"## {title}", f"Made by `{command}`.", *body, end])
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    before, found, rest = text.partition(begin)
    text = before + part + rest.partition(end)[2] if found else f"{text}\n{part}\n"
    path.write_text(text, encoding="utf-8")
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
    """Save `docs/studies/NAME.svg`; returns the Markdown that shows it, with `text` for readers who cannot see it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
    return f"![{text}]({name}.svg)"


def _stored(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)
