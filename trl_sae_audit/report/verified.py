"""Predicted against measured change, from the directory that `verify` wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..io.manifest import MANIFEST, read_manifest, reading, stored_files
from ..io.tables import read_frame
from ..record.rollouts import COLUMNS, read_rollouts
from ..text import sanitize_excerpt
from .axes import can_be_drawn
from .charts import HEIGHT, WIDTH, choose_ticks
from .rollouts import Reader, pair_rollouts
from .text import describe_ceiling, format_count, format_number, format_percent, format_signed

TABLE = "verify.parquet"
_MOST_POINTS = 1500


@dataclass(frozen=True)
class Scatter:
    """A point per feature: SVG path data in 1000 × 100 units, ticks in percent, and the position of zero."""

    path: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    zero: tuple[float, float]


@dataclass(frozen=True)
class Target:
    """How well every score predicted one kind of change.

    Attributes:
        sentence: what was measured, and how well the best score did.
        rows: per score, its name, R², ρ and hits among the top, with intervals; best first.
        best: the score shown in the scatter plot.
    """

    name: str
    sentence: str
    rows: list[list[str]]
    top_k: int
    best: str
    scatter: Scatter | None


@dataclass(frozen=True)
class VerifiedSamples:
    """Answers before and after, and the identity of the dictionary whose features are marked."""

    identity: str
    reader: Reader


def read_verified(directory: str | os.PathLike[str]) -> list[Target]:
    """Read the output directory of `verify`.

    Raises:
        AuditError: it is not one, or its format is unknown.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, "verification")
    with reading(directory / MANIFEST):
        stored = next(each for each in stored_files(manifest) if each.file == TABLE)
        table = read_frame(stored.read(directory), columns=("target", "feature", "measured"))
        texts = table.drop(columns="target").select_dtypes(exclude="number").columns
        if len(texts):
            raise ValueError(f"column {texts[0]!r} of the table is not of numbers")
        return [
            _build_target(kind, figures, table[table["target"] == kind])
            for kind, figures in manifest["targets"].items()
        ]


def read_verified_samples(directory: str | os.PathLike[str]) -> VerifiedSamples | None:
    """The answers that `verify` sampled before and after; None where it kept none, or none with anything to mark.

    Raises:
        AuditError: as `read_verified`, or files that do not fit each other.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, "verification")
    if "samples" not in manifest:
        return None
    with reading(directory / MANIFEST):
        kept = manifest["samples"]
        stored = {each.file: each for each in stored_files(manifest)}
        rollouts, tokens, activations = (
            read_frame(stored[f"{name}.parquet"].read(directory), columns=("step", *columns))
            for name, columns in COLUMNS.items()
        )
        dictionary = str(kept["dictionary"])
        features = [int(feature) for feature in kept["features"]]
        reader = pair_rollouts(dictionary, features, read_rollouts(rollouts, tokens, activations))
        return VerifiedSamples(str(kept["identity"]), reader) if reader else None


def _build_target(kind: str, target: Mapping[str, Any], table: pd.DataFrame) -> Target:
    scores = sorted(
        target["scores"].items(), key=lambda item: math.inf if item[1]["r2"][0] is None else -item[1]["r2"][0]
    )
    best, figures = scores[0]
    changed = f"Change of {format_count(target['features'], 'active feature')}, {kind}, on {format_count(target['prompts'], 'prompt')}"
    explained = figures["r2"][0]
    if explained is None:
        sentence = f"{changed}: how much of it a score explains cannot be said, for nothing changed or no score varies."
    else:
        sentence = (
            f"{changed}: the best score, {sanitize_excerpt(best, 60)}, explains {format_percent(explained)} of it "
            f"({describe_ceiling(target['ceiling'], explained)})."
        )
    rows = [
        [
            sanitize_excerpt(name, 60),
            _format_interval(each["r2"], format_number),
            _format_interval(each["spearman"], format_signed),
            _format_interval(each["precision"], lambda value, _: format_percent(value)),
        ]
        for name, each in scores
    ]
    return Target(
        kind, sentence, rows, int(target["top_k"]), sanitize_excerpt(best, 60), _draw_scatter(table, best)
    )


def _format_interval(values: list[float | None], text: Any) -> str:
    value, low, high = (float("nan") if each is None else each for each in values)
    return f"{text(value, 2)} ({text(low, 2)} to {text(high, 2)})"


def _draw_scatter(table: pd.DataFrame, score: str) -> Scatter | None:
    if score not in table:
        return None
    table = table[can_be_drawn(table[score]) & can_be_drawn(table["measured"])]
    if not len(table):
        return None
    largest = table.reindex(table["measured"].abs().sort_values(ascending=False).index).head(_MOST_POINTS)
    x, y = largest[score].to_numpy(), largest["measured"].to_numpy()
    x_ticks = choose_ticks(min(0.0, x.min()), max(0.0, x.max()), 4)
    y_ticks = choose_ticks(min(0.0, y.min()), max(0.0, y.max()), 4)

    def place(values: Any, marks: list[float]) -> np.ndarray:
        return (np.asarray(values, float) - marks[0]) / (marks[-1] - marks[0])

    across, down = WIDTH * place(x, x_ticks), HEIGHT * (1 - place(y, y_ticks))
    return Scatter(
        "".join(f"M{a:.0f} {d:.1f}h0" for a, d in zip(across, down, strict=True)),
        [
            (float(at), format_number(tick))
            for at, tick in zip(100 * place(x_ticks, x_ticks), x_ticks, strict=True)
        ],
        [
            (float(at), format_number(tick))
            for at, tick in zip(100 * (1 - place(y_ticks, y_ticks)), y_ticks, strict=True)
        ],
        (float(WIDTH * place(0.0, x_ticks)), float(HEIGHT * (1 - place(0.0, y_ticks)))),
    )
