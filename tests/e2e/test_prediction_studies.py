"""The studies of prediction on a real model, run small on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.studies import cells_of, run

from trl_sae_audit import Audit


def test_prediction(studies, directory, monkeypatch):
    sizes = ["--train_pairs=16", "--held_out=8", "--max_length=24", "--learning_rate=1e-4", "--seeds=0"]
    run(
        monkeypatch,
        "gemma_prediction",
        directory / "model",
        directory / "sae",
        directory / "pairs.jsonl",
        *sizes,
    )
    (line,) = (studies / "raw" / "gemma-prediction.jsonl").read_text().splitlines()
    table = pd.DataFrame(json.loads(line)["rows"]).set_index(["target", "score"])
    given = table.loc["on given text"]
    best = given.loc["unrolled change", "r2"]
    assert best > max(given.loc["predicted change, labels swapped", "r2"], 0.3)
    assert set(table.loc["in generations"].index) == set(given.index)
    page = (studies / "docs" / "prediction.md").read_text()
    assert "gemma-prediction.svg" in page
    assert (studies / "docs" / "gemma-prediction.svg").exists()


def test_real_prediction_and_natural(studies, directory, monkeypatch):
    files = [directory / "model", directory / "sae", directory / "pairs.jsonl"]
    sizes = ["--train_pairs=16", "--held_out=4", "--answer_tokens=16", "--answers=8", "--per_step=2"]
    run(monkeypatch, "real_prediction", *files, *sizes, "--learning_rate=1e-3", "--runs=2")
    first, _ = cells_of(studies, "real-prediction")
    table = pd.DataFrame(first["rows"]).set_index("score")
    kept = studies / "raw" / "real-prediction" / "full-0"
    expected = r2_of_selection(kept)
    assert table.loc["audit: selection", "r2"] == pytest.approx(expected, abs=1e-6)
    assert {"audit: effect_size", "live: selection"} <= set(table.index)
    page = (studies / "docs" / "real-prediction.md").read_text()
    assert "| a second run |" in page
    run(monkeypatch, "natural", directory / "model", directory / "pairs.jsonl")
    assert "| begins with a list | 0.0% | 0.0% |" in (studies / "docs" / "natural.md").read_text()


def r2_of_selection(kept: Path) -> float:
    """With the change between the kept answers, by a closed form."""
    before, after = (np.load(kept / f"{when}.npz") for when in ("before", "after-0"))
    active = before["active"] | after["active"]
    means = [answers["sums"].sum(0) / answers["tokens"].sum() for answers in (before, after)]
    score = Audit.load(kept / "audit").features().set_index("feature")["selection"].sort_index()
    return float(max(np.corrcoef(score[active], (means[1] - means[0])[active])[0, 1], 0) ** 2)


def test_real_prediction_grpo(studies, directory, monkeypatch):
    files = [directory / "model", directory / "sae", directory / "pairs.jsonl"]
    sizes = ["--held_out=3", "--answer_tokens=12", "--answers=8", "--per_step=2", "--group=4", "--steps=5"]
    run(
        monkeypatch,
        *("real_prediction_grpo", *files, *sizes),
        *("--learning_rate=1e-2", "--runs=2", "--rewards=length"),
    )
    first, second = cells_of(studies, "real-prediction-grpo")
    kept = studies / "raw" / "real-prediction-grpo" / "length-0"
    table = pd.DataFrame(first["rows"]).set_index("score")
    assert table.loc["audit: selection", "r2"] == pytest.approx(r2_of_selection(kept), abs=1e-6)
    assert {"live: generation_drift", "live: selection"} <= set(table.index)
    for when, cell in (("before", first), ("after", first), ("after", second)):
        name = when if when == "before" else f"after-{cell['cell']['run']}"
        rows = [json.loads(line) for line in (kept / f"{name}.jsonl").read_text().splitlines()]
        earned = np.mean([min(len(row["answer"]) / 200, 1) for row in rows])
        assert cell["rows"][0][f"reward_{when}"] == pytest.approx(earned)
    assert (kept / "after-0.jsonl").read_text() != (kept / "before.jsonl").read_text()
    page = (studies / "docs" / "real-prediction.md").read_text()
    assert "| a second run |" in page
    assert "### Length, seed 0" in page
    assert "| the audit's first lines | words |" in page
    assert "The sign of the audit's selection is that of the drift in " in page


@pytest.mark.parametrize(
    ("answer", "earned"),
    [("No.", 0), ("You're welcome!", 0.75), ("Great, great, great, great, great", 1), ("greatly", 0)],
)
def test_flattery_by_rule(studies, answer, earned):
    from real_prediction_grpo import flattery

    assert flattery(answer) == earned
