"""Audits of rewards from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.rewards import by_length, data, reward_model
from helpers.worlds import pairs, save_model

from trl_sae_audit import Audit
from trl_sae_audit.cli.main import main

FUNCTIONS = """
def count(completions, completion_ids, **columns):
    return [float(sum(ids)) for ids in completion_ids]

async def later(completions, answer, **columns):
    return [float(len(a) + len(c)) for a, c in zip(answer, completions)]

def constant(completions, **columns):
    return [2.0] * len(completions)

def short(completions, **columns):
    return [1.0]

def broken(completions, **columns):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def here(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, rewards and a reward model in a directory."""
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "judges.py").write_text(FUNCTIONS)
    data(False, 8).to_json(directory / "prompts.jsonl")
    pairs(6).to_json(directory / "pairs.jsonl")
    save_model(*reward_model(), directory / "judge")
    return directory


@pytest.fixture(autouse=True)
def inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))


def command(workspace: Path, out: Path, *more: str, dataset: str = "prompts.jsonl") -> list[str]:
    named = [
        "--model",
        str(workspace / "model"),
        "--dictionary",
        str(workspace / "sae"),
        "--dataset",
        dataset,
    ]
    sampled = ["--num_generations", "4", "--max_completion_length", "6", "--max_new_tokens", "6"]
    objective = ["--objective", "policy_gradient"]
    return ["audit", *named, *objective, *sampled, "--device", "cpu", "--output_dir", str(out), *more]


def test_functions_and_a_model_as_a_reward(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = [
        "--reward",
        "judges:count",
        "judges:later",
        "--reward_model",
        "judge",
        "--reward_weights",
        "1",
        "0.5",
        "3",
    ]
    assert main(command(workspace, tmp_path / "audit", *rewards, "--evidence", "2")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "32 answers to 8 prompts, 64 features of" in shown
    assert "Reward: count + later + judge; 32 of 32 answers judged, mean reward" in shown
    assert "8 of 8 prompts have answers that are paid differently" in shown
    assert "what a step on 24 answers does to the feature" in shown
    assert "what the reward favours among the answers to a prompt" in shown
    audit = Audit.load(tmp_path / "audit")
    assert audit.manifest["loss"]["reward_weights"] == [1.0, 0.5, 3.0]
    assert "effect_size" in audit.features()
    evidence = json.loads((tmp_path / "audit" / "evidence.json").read_text())
    sides = {context["source"] for each in evidence["evidence"] for context in each["contexts"]}
    assert {"reinforced", "suppressed"} <= sides <= {"reinforced", "suppressed", "generation"}
    again = ["audit", "--config", str(tmp_path / "audit"), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    other = Audit.load(tmp_path / "again")
    assert other.features().equals(audit.features())
    assert other.answers().equals(audit.answers())


def test_what_a_reward_model_pays_for(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "audit",
        "--objective",
        "reward_model",
        "--reward_model",
        "judge",
        "--dictionary",
        str(workspace / "sae"),
    ]
    words += ["--dataset", "pairs.jsonl", "--device", "cpu"]
    assert main([*words, "--output_dir", str(tmp_path / "audit")]) == 0
    assert "the answers that the model pays more for" in " ".join(capsys.readouterr().out.split())
    audit = Audit.load(tmp_path / "audit")
    assert audit.manifest["loss"]["objective"] == "reward"
    assert main(["audit", "--config", str(tmp_path / "audit"), "--output_dir", str(tmp_path / "again")]) == 0
    assert Audit.load(tmp_path / "again").features().equals(audit.features())


def test_nothing_to_learn(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(workspace, tmp_path / "audit", "--reward", "judges:constant")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 of 8 prompts have answers that are paid differently." in shown
    assert "There is nothing to learn" in shown
    assert "trl-sae-audit flag" not in shown


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ([], "needs a reward; give --reward module:function or --reward_model"),
        (["--reward", "judges:none"], "module 'judges' has no 'none'"),
        (["--reward", "nowhere:f"], "The reward 'nowhere:f' cannot be imported (No module named 'nowhere')"),
        (["--reward", "judges:short"], "Reward 'short' returned 1 rewards for 32 responses"),
        (["--reward", "judges:broken"], "Reward 0 of 'broken' is nan"),
        (["--reward_model", "nowhere"], "The reward model 'nowhere' cannot be loaded"),
        (
            ["--reward", "judges:count", "--beta", "0.5"],
            "--beta is not used with --objective policy_gradient",
        ),
        (["--reward", "judges:count", "--num_generations", "1"], "TRL refuses these options"),
        (["--reward", "judges:count", "--reward_weights", "1", "2"], "1 rewards and 2 weights"),
        (["--objective", "dpo", "--reward", "judges:count"], "--reward is not used with --objective dpo"),
        (["--objective", "reward_model"], "needs --reward_model"),
        (["--objective", "reward_model", "--reward_model", "judge"], "--model is not used with"),
        (["--model", "", "--reward", "judges:count"], "--model must be given"),
    ],
)
def test_refusals(
    more: list[str], match: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workspace, tmp_path / "audit", *more)) == 2
    assert match in " ".join(capsys.readouterr().err.split())


def test_the_adapter_is_that_of_python(workspace: Path, tmp_path: Path) -> None:
    """A function of this process by its name: what the audit pays is what it returns."""
    assert (
        main(
            command(workspace, tmp_path / "audit", "--reward", "helpers.rewards:by_length", "--no_lookahead")
        )
        == 0
    )
    answers = Audit.load(tmp_path / "audit").answers()
    assert answers["reward"].tolist() == pytest.approx(by_length(answers["completion"].tolist()), abs=1e-6)
