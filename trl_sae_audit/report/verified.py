"""Predicted against realised, from the directory that `verify` wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import AuditError
from ..untrusted import read_json
from ..untrusted_tables import read_frame
from .charts import HEIGHT, WIDTH, ticks
from .text import counted, percent, plain, shown, signed

_SCHEMA = 1
_MOST_POINTS = 1500


@dataclass(frozen=True)
class Scatter:
    """A point a feature: SVG path data in 1000 × 100 units, ticks in percent, where zero is."""

    path: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    zero: tuple[float, float]


@dataclass(frozen=True)
class Target:
    """How well every score predicted one kind of change.

    Attributes:
        sentence: what was measured, and how well the best score did.
        rows: of each score, its name, R², ρ and hits among the top, with intervals; the best first.
        best: the score of the scatter.
    """

    name: str
    sentence: str
    rows: list[list[str]]
    top_k: int
    best: str
    scatter: Scatter | None


def read_verified(directory: str | os.PathLike[str]) -> list[Target]:
    """Read the output directory of `verify`.

    Raises:
        AuditError: it is none, or of an unknown schema version.
    """
    directory = Path(directory)
    try:
        described = read_json(directory / "verify.json")
        if described["schema_version"] != _SCHEMA:
            raise ValueError(f"schema version {described['schema_version']}, and this reads {_SCHEMA}")
        table = read_frame(directory / "verify.parquet", columns=("target", "feature", "realised"))
        texts = table.drop(columns="target").select_dtypes(exclude="number").columns
        if len(texts):
            raise ValueError(f"column {texts[0]!r} of verify.parquet is not of numbers")
        return [
            _target(kind, found, table[table["target"] == kind])
            for kind, found in described["targets"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise AuditError(
            f"{directory} was not written by `verify`, or is damaged ({error}); pass the output_dir of trl-sae-audit verify."
        ) from error


def _target(kind: str, found: Mapping[str, Any], table: pd.DataFrame) -> Target:
    scores = sorted(found["scores"].items(), key=lambda item: -(item[1]["r2"][0] or -1.0))
    best, figures = scores[0]
    sentence = (
        f"Change of {counted(found['features'], 'active feature')}, {kind}, on {counted(found['prompts'], 'prompt')}: the best "
        f"score, {shown(best, 60)}, explains {percent(figures['r2'][0] or 0.0)} of it (a perfect one would explain "
        f"{percent(found['ceiling'])})."
    )
    rows = [
        [
            shown(name, 60),
            _interval(each["r2"], plain),
            _interval(each["spearman"], signed),
            _interval(each["precision"], lambda value, _: percent(value)),
        ]
        for name, each in scores
    ]
    return Target(kind, sentence, rows, int(found["top_k"]), shown(best, 60), _scatter(table, best))


def _interval(values: list[float | None], text: Any) -> str:
    value, low, high = (float("nan") if each is None else each for each in values)
    return f"{text(value, 2)} ({text(low, 2)} to {text(high, 2)})"


def _scatter(table: pd.DataFrame, score: str) -> Scatter | None:
    if score not in table or not len(table):
        return None
    largest = table.reindex(table["realised"].abs().sort_values(ascending=False).index).head(_MOST_POINTS)
    x, y = largest[score].to_numpy(), largest["realised"].to_numpy()
    x_ticks = ticks(min(0.0, x.min()), max(0.0, x.max()), 4)
    y_ticks = ticks(min(0.0, y.min()), max(0.0, y.max()), 4)

    def place(values: Any, marks: list[float]) -> np.ndarray:
        return (np.asarray(values, float) - marks[0]) / (marks[-1] - marks[0])

    across, down = WIDTH * place(x, x_ticks), HEIGHT * (1 - place(y, y_ticks))
    return Scatter(
        "".join(f"M{a:.0f} {d:.1f}h0" for a, d in zip(across, down, strict=True)),
        [(float(at), plain(tick)) for at, tick in zip(100 * place(x_ticks, x_ticks), x_ticks, strict=True)],
        [
            (float(at), plain(tick))
            for at, tick in zip(100 * (1 - place(y_ticks, y_ticks)), y_ticks, strict=True)
        ],
        (float(WIDTH * place(0.0, x_ticks)), float(HEIGHT * (1 - place(0.0, y_ticks)))),
    )
