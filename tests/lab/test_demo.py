"""`trl-sae-audit demo`, shortened, and what it leaves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from trl_sae_audit import Audit, FlagSet, RunRecord
from trl_sae_audit.cli import main as cli
from trl_sae_audit.cli.origins import origins
from trl_sae_audit.cli.trained_model import check_trained
from trl_sae_audit.lab import DictionaryConfig, ModelConfig, RewardConfig, WorldConfig, build_world
from trl_sae_audit.lab.demo import loop
from trl_sae_audit.outcomes import read_outcomes

SMALL = WorldConfig(
    model=ModelConfig(steps=200),
    dictionary=DictionaryConfig(texts=1000, steps=150, heldout_texts=100),
    reward=RewardConfig(pairs=64, heldout_pairs=32),
    ground_truth_texts=100,
    evaluation_prompts=50,
)
"""A world made in seconds: its model has learned the words, if not the facts."""
ON_POLICY = "ppo" if importlib.util.find_spec("trl.experimental.ppo") else "grpo"


def test_demo_goes_round_the_loop_and_ends_with_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(loop, "build_world", lambda seed: build_world(config=SMALL, progress=False))
    directory = tmp_path / "demo"
    directory.mkdir()
    for name in (".made-by-demo", "of an earlier demo"):
        (directory / name).touch()
    sizes = {"--steps": 2, "--pairs": 200, "--rl_steps": 1, "--answers": 40}
    options = [str(part) for pair in sizes.items() for part in pair]
    assert cli.main(["demo", "--output_dir", str(directory), *options]) == 0

    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1].split() == ["Report:", str(directory / "report.html")]
    assert all(len(line.rstrip()) <= 80 or str(directory) in line for line in lines)

    assert not (directory / "of an earlier demo").exists()
    assert {"lab-model", "reward_model", "dictionary", "pairs.jsonl"} <= {
        path.name for path in directory.iterdir()
    }
    flags = FlagSet.load(directory / "flags.yaml")
    assert Audit.load(directory / "audit").dictionary.name == flags[0].dictionary
    assert (directory / "audit" / "evidence.md").is_file()
    assert 0 < len((directory / "filtered" / "kept.jsonl").read_text().splitlines()) < 200
    for run in ("dpo-plain", "dpo-filtered", "dpo-shaped", f"{ON_POLICY}-plain", f"{ON_POLICY}-shaped"):
        record = RunRecord.load(directory / run)
        assert record.status == "finished"
        assert (record.features()["attribution"] != 0).any()
        measured = {(outcome.measure, outcome.stage) for outcome in read_outcomes(directory / run)}
        assert {("agrees", "before"), ("agrees", "after"), ("right", "after")} <= measured
        assert f"{run} " in "\n".join(lines)
        place = origins(str(directory / run))["after"]
        assert place == str(directory / "models" / run)
        check_trained(record, AutoModelForCausalLM.from_pretrained(place), place, "--after")
    assert not (directory / "dpo-plain-2").exists()
    said = "\n".join(lines)
    for part in ("What goes wrong", "The audit saw it coming", "Risen most: dpo-shaped", "Verdict"):
        assert part in said
    page = (directory / "report.html").read_text()
    for said in ("What the plain run taught", "filtered", "shaped", "agrees with the user", "answers right"):
        assert said in page
    assert "agrees with the user" in (directory / f"report-{ON_POLICY}.html").read_text()


def test_demo_as_one_json_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "build_world", lambda seed: build_world(config=SMALL, progress=False))
    sizes = ["--steps", "1", "--pairs", "200", "--rl_steps", "0", "--answers", "20"]
    assert cli.main(["demo", "--output_dir", str(tmp_path / "demo"), *sizes, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["outcomes"]) == {"before", "dpo-plain", "dpo-filtered", "dpo-shaped"}
    assert Path(document["report"]).is_file()
    assert 0 <= document["verdict"]["foretold"] <= document["verdict"]["of"] == 10


def test_demo_refuses_a_directory_that_is_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    assert cli.main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "was not made by the demo" in capsys.readouterr().err
    assert (tmp_path / "precious").exists()
