"""The lab's studies of recovery and prediction, run small: they end with tables and a figure, and their parts are right."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from trl_sae_audit.lab import build_world
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.verification.measured import AnswerActivations, MeasuredChange

STUDIES = Path(__file__).parents[2] / "scripts" / "studies"


@pytest.fixture
def studies(monkeypatch, tmp_path):
    """The studies' modules, small and writing into a directory of their own."""
    monkeypatch.syspath_prepend(str(STUDIES))
    import common
    import lab_scores
    import prediction
    import prediction_meter
    import recovery

    for module, settings in (
        (common, {"RAW": tmp_path / "raw", "RESULTS": tmp_path / "docs"}),
        (lab_scores, {"RAW": tmp_path / "raw", "PAIRS": 128, "PROBE": 8, "ANSWERS": Sampling(2, 10)}),
        (prediction, {"STEPS": 3, "PLANTS": ("agrees",)}),
        (prediction_meter, {"HELD_OUT_PAIRS": 12, "HELD_OUT_PROMPTS": 40, "STEPS": 3}),
        (prediction_meter, {"SAMPLING": Sampling(2, 20), "RAW": tmp_path / "raw"}),
        (recovery, {"PLANTS": ("agrees",), "SHUFFLES": 1, "PAIRS": 128}),
    ):
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
    yield tmp_path / "docs"
    for name in ("common", "lab_scores", "prediction", "prediction_meter", "recovery"):
        del sys.modules[name]


def run(monkeypatch, name: str) -> None:
    import importlib

    monkeypatch.setattr(sys, "argv", [str(STUDIES / f"{name}.py"), "--seeds", "1"])
    importlib.import_module(name).main()


def test_both_write_their_report(studies, monkeypatch):
    import prediction
    import recovery

    two_runs = {**prediction.cells(1)[1], "runs": 2}
    cells = {"prediction": [two_runs], "recovery": recovery.cells(1)[:2]}
    monkeypatch.setattr(prediction, "cells", lambda seeds: cells["prediction"])
    monkeypatch.setattr(recovery, "cells", lambda seeds: cells["recovery"])
    run(monkeypatch, "prediction")
    text = (studies / "prediction.md").read_text()
    for part in (
        "unrolled, in generations",
        "labels swapped",
        "a second run",
        "what runs share",
        "attribution, random directions",
    ):
        assert part in text
    run(monkeypatch, "recovery")
    text = (studies / "recovery.md").read_text()
    for part in ("by chance", "both answers drawn alike", "lookahead, in generations", "70%"):
        assert part in text
    assert {path.name for path in studies.glob("*.svg")} == {"prediction.svg", "recovery.svg"}


def test_swapped_labels_say_nothing_and_lose_nothing(studies):
    import lab_scores

    world = build_world(0, progress=False)
    pairs = lab_scores.planted_pairs(world, "agrees", 0.7)
    swapped = lab_scores.swapped(pairs, 0)
    same = np.array(swapped["chosen"]) == np.array(pairs["chosen"])
    assert 0.35 < same.mean() < 0.65
    for before, after in zip(pairs, swapped, strict=True):
        assert {before["chosen"], before["rejected"]} == {after["chosen"], after["rejected"]}


def test_ranks_are_counted_from_the_largest_score(studies):
    import recovery

    rows = pd.DataFrame(
        {
            "score": ["attribution"] * 4,
            "plant": ["agrees"] * 4,
            "strength": [0.7] * 4,
            "rank": [1, 3, 4, 200],
            "carriers": [5] * 4,
            "features": [256] * 4,
            "in_top": [1] * 4,
        }
    )
    line = recovery.default_table(rows).iloc[0]
    assert line["a carrier in the top 3"].startswith("2 of 4")
    assert line["worst"] == "200"
    assert recovery.by_chance(rows) == pytest.approx(1 - 251 / 256 * 250 / 255 * 249 / 254)


def test_what_runs_share_is_the_r2_of_the_common_part(studies):
    """Runs made of a common part and as much noise: r = 1/2, and 3/4 of the mean of three."""
    import prediction

    random = np.random.default_rng(0)
    d_sae, units = 4_000, 2
    common = random.standard_normal(d_sae)
    prompts, tokens = ("one", "two"), np.array([1.0, 3.0])
    before = AnswerActivations(np.zeros((units, d_sae)), tokens, prompts, np.ones(d_sae, bool))
    runs = []
    for _ in range(3):
        change = common + random.standard_normal(d_sae)
        sums = np.stack([change, 3 * change])
        after = AnswerActivations(sums, tokens, prompts, np.ones(d_sae, bool))
        runs.append(MeasuredChange("in generations", before, after))
    shared = prediction.agreement(runs)
    assert shared == pytest.approx(0.5, abs=0.03)
    rows = pd.DataFrame(prediction._compared({"common": common}, runs, 3)).set_index(["of", "score"])
    assert rows.loc[("one run", "common"), "r2"] == pytest.approx(shared, abs=0.04)
    assert rows.loc[("one run", "a second run"), "r2"] == pytest.approx(shared**2, abs=0.04)
    of_mean = rows.loc[("mean of the runs", "common")]
    assert of_mean["r2"] == pytest.approx(0.75, abs=0.03)
    assert of_mean["shared"] == pytest.approx(0.75, abs=0.03)
    alone = pd.DataFrame(prediction._compared({"common": common}, runs[:1], 3))
    assert set(alone["of"]) == {"one run"}


def test_of_a_world_with_several_runs_these_are_reported(studies):
    import prediction

    row = {
        "seed": 0,
        "plant": "agrees",
        "steps": [3],
        "run_steps": 3,
        "target": "in generations",
        "score": "disparity",
    }
    several = [row | {"of": of, "shared": 0.9, "r2": 0.5} for of in ("one run", "mean of the runs")]
    found = prediction.latest(pd.DataFrame([row | {"r2": 0.4}, *several]))
    assert found["r2"].tolist() == [0.5, 0.5]
    assert prediction.latest(pd.DataFrame([row | {"r2": 0.4}]))["of"].tolist() == ["one run"]


def test_the_table_over_training(studies):
    import prediction

    rows = [
        {
            "score": "disparity",
            "target": target,
            "run_steps": steps,
            "r2": steps / 200 + (target == "in generations") / 10,
        }
        for target in ("on given text", "in generations")
        for steps in prediction.OVER_TRAINING
    ]
    line = prediction.over_training(pd.DataFrame(rows)).iloc[0]
    assert line["on given text, 40 steps"] == "0.20"
    assert line["in generations, 160 steps"] == "0.90"


def test_other_layers_and_lora_stand_beside_the_same_worlds(studies):
    import prediction

    scores = ["attribution", "mean activation difference"]
    scores += [
        f"{kind}, {what}"
        for kind in ("lookahead", "unrolled")
        for what in ("on given text", "in generations")
    ]
    rows = [
        {
            "seed": seed,
            "plant": "agrees",
            "steps": [3],
            "run_steps": 3,
            "target": target,
            "score": score,
            "r2": r2,
        }
        | ({"variant": variant} if variant else {})
        for seed, variant, r2 in ((0, None, 0.5), (1, None, 0.9), (0, prediction.LORA, 0.25))
        for target in ("on given text", "in generations")
        for score in scores
    ]
    found = prediction.by_variant(prediction.latest(pd.DataFrame(rows)))
    assert found[""].tolist() == [prediction.AS_IT_IS, prediction.LORA]
    assert found["in generations: unrolled"].tolist() == ["0.50", "0.25"]


def test_a_pace_has_cells_of_its_own_and_leaves_the_fast_ones_as_they_were(studies, monkeypatch):
    import stability

    (fast,), (slow,) = (stability.cells("grpo", pace, [0], ["plain"], ()) for pace in ("fast", "slow"))
    assert "pace" not in fast
    assert slow == {**fast, "pace": "slow"}
    assert {("grpo", "slow"), ("ppo", "slow")} <= set(stability.TRAINING)
    for name in ("stability", "shaped_runs"):
        del sys.modules[name]


def test_a_report_replaces_its_own_part_of_a_page(studies, monkeypatch):
    import common

    monkeypatch.setattr(sys, "argv", [str(STUDIES / "recovery.py"), "--x"])
    page = common.write_report("one", "One", ["## Table", "first"], page="page")
    common.write_report("two", "Two", ["kept"], page="page")
    page.write_text(
        page.read_text(encoding="utf-8").replace("# One\n", "# A question\n\nBy hand.\n", 1), encoding="utf-8"
    )
    common.write_report("one", "One", ["## Table", "second"], page="page")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# A question\n\nBy hand.\n")
    assert "second" in text
    assert "first" not in text
    assert text.count("### Table") == text.count("kept") == text.count("<!-- end: one -->") == 1


def test_a_direction_reads_what_the_features_read(studies, monkeypatch):
    import directions_lab

    monkeypatch.setattr(directions_lab, "ANSWERS", 600)
    monkeypatch.setattr(directions_lab, "BEHAVIOURS", ("marked",))
    run(monkeypatch, "directions_lab")
    rows = pd.DataFrame(directions_lab.read({"seed": 0, "behaviour": "marked"}))
    best = rows.groupby("reader")["auc"].max()
    assert best["direction"] > 0.75
    assert best["carrier"] > 0.75
    assert "R² of the feature chosen on the same pairs" in (studies / "directions.md").read_text()
