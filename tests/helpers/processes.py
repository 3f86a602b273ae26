"""Starting real processes, and comparing what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers.reference import (
    relative_error,
)
from trl_sae_audit import RunRecord

TESTS = Path(__file__).parents[1]


SIDES = ("chosen", "rejected", "positive", "negative")
"""Two of them are columns of any record."""

SCORES = ["attribution", "cosine", "share", "standard_error", *SIDES]


TOKEN_SCORES = ["token_share", "activation_attribution"]

SELECTION = [
    "selection",
    "selection_standard_error",
    *(f"selection_{side}" for side in SIDES),
    "response_activation",
    "response_frequency",
]
"""Columns of the dictionaries that have an encoder."""


def start(*command: str) -> None:
    """Run process_worker.py, alone or by a launcher."""
    paths = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def kept(directory: Path) -> list[dict[str, Any]]:
    """What each process left of one case."""
    ranks = sorted(directory.glob("rank*.pt"), key=lambda path: int(path.stem.removeprefix("rank")))
    return [torch.load(path, weights_only=False) for path in ranks]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected value, if any is not 0: SFT has no sides."""
    return relative_error(found, expected) if expected.any() else float(np.abs(found).max())


def assert_same_record(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Both records say the same of every step, feature and example."""
    one, other = RunRecord.load(expected / "record"), RunRecord.load(found / "record")
    keys = ["dictionary", "step", "feature"]
    steps, others = (record.steps().sort_values(keys, ignore_index=True) for record in (one, other))
    pd.testing.assert_frame_equal(steps[keys], others[keys])
    scores = [name for name in (*SCORES, *TOKEN_SCORES) if name in steps]
    assert len(set(SIDES) & set(scores)) == 2
    for (dictionary, step), rows in steps.groupby(["dictionary", "step"]):
        for score in scores:
            error = difference(others.loc[rows.index, score].to_numpy(), rows[score].to_numpy())
            assert error <= tolerance, (dictionary, step, score, error)
        if "selection" in rows and rows["selection"].notna().any():
            for score in (name for name in SELECTION if name in rows):
                error = difference(others.loc[rows.index, score].to_numpy(), rows[score].to_numpy())
                assert error <= 10 * tolerance, (dictionary, step, score, error)
    counts = ["step", "global_step", "examples", "positive_rows", "negative_rows"]
    gradients = [record.table("gradient").sort_values(["dictionary", "step"]) for record in (one, other)]
    assert gradients[0][counts].to_numpy().tolist() == gradients[1][counts].to_numpy().tolist()
    keys = ["dictionary", "feature"]
    totals = [record.features().sort_values(keys, ignore_index=True) for record in (one, other)]
    for _, rows in totals[0].groupby("dictionary"):
        for column in ("attribution", "standard_error", "share", *(side for side in SIDES if side in rows)):
            error = difference(totals[1].loc[rows.index, column].to_numpy(), rows[column].to_numpy())
            assert error <= tolerance, (column, error)
    examples, more = (
        record.table("examples").sort_values(["step", "label", "attribution"]) for record in (one, other)
    )
    assert examples[["step", "label"]].to_numpy().tolist() == more[["step", "label"]].to_numpy().tolist()
    assert relative_error(more["attribution"].to_numpy(), examples["attribution"].to_numpy()) <= tolerance
    if "drift" in one.tables and "zero3" not in found.parent.name:
        drift, drifted = (record.table("drift")["drift"].to_numpy() for record in (one, other))
        assert np.abs(drift).max() > 0
        assert relative_error(drifted, drift) <= tolerance
