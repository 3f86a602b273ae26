"""An audit of a model that has no dictionary trains one on the data, says so, and keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.sae_training import save_narrow_model
from helpers.worlds import pairs

from trl_sae_audit import Audit, load_dictionary
from trl_sae_audit.cli.main import main
from trl_sae_audit.saes import on_the_spot


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(on_the_spot, "ON_CPU", (20_000, 60 * 1024))
    save_narrow_model(tmp_path / "model")
    pairs(200).to_json(tmp_path / "pairs.jsonl")
    model = ["--model", str(tmp_path / "model"), "--device", "cpu", "--no_lookahead"]
    return [
        *("audit", *model, "--dataset", str(tmp_path / "pairs.jsonl")),
        *("--output_dir", str(tmp_path / "audit")),
    ]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_none_is_registered_so_one_is_trained_and_kept(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    told = said(capsys)
    assert "No SAE of the residual stream of" in told
    assert "is registered in sae-lens. " in told
    assert "trl-sae-audit direction" not in told
    assert (
        "An SAE is trained on these texts first: 64 features at model.layers.1, at most 20,000 of their tokens; about"
        in told
    )
    kept = tmp_path / "audit-sae"
    assert f"--dictionary {kept} in the next command" in told
    audit = Audit.load(tmp_path / "audit")
    assert audit.dictionary.identity == load_dictionary(kept).identity
    assert audit.manifest["config"]["dictionary"] == str(kept)
    assert main(["audit", "--config", str(tmp_path / "audit"), "--output_dir", str(tmp_path / "audit")]) == 0
    assert main(command) == 0
    assert f"The dictionary is the one in {kept}, trained before." in said(capsys)


def test_prompts_alone_are_no_texts_to_train_on(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    asked = [
        "--dictionary",
        "train",
        "--objective",
        "policy_gradient",
        "--reward",
        "helpers.worlds:reward_by_length",
    ]
    assert main([*command, *asked]) == 2
    assert "they have prompts alone (columns ['prompt'])" in said(capsys)
    assert not (tmp_path / "audit-sae").exists()


def test_other_commands_say_where_one_is_trained(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", str(workspace / "model"), "--dataset", str(workspace / "pairs.jsonl")]
    assert main(["doctor", *asked, "--dictionary", "train"]) == 2
    assert "--dictionary train makes an SAE in `audit`" in said(capsys)


def test_without_a_directory_another_audit_is_numbered_and_the_same_goes_on(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        *("audit", "--model", str(workspace / "model"), "--dataset", str(workspace / "pairs.jsonl")),
        *("--dictionary", str(workspace / "sae"), "--no_lookahead", "--max_rows"),
    ]
    for rows, name, why in (
        ("6", "", ""),
        ("8", "-2", "of another dataset"),
        ("8", "-2", "of another dataset"),
        ("6", "", ""),
    ):
        assert main([*command, rows]) == 0
        shown = capsys.readouterr()
        assert f"{tmp_path}/runs/audit-model-pairs{name}; next:" in shown.out
        assert why in shown.err
        assert (f"goes to runs/audit-model-pairs{name}." in " ".join(shown.err.split())) == bool(why)
        assert len(Audit.load(f"runs/audit-model-pairs{name}")) == int(rows)
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "audit-model-pairs",
        "audit-model-pairs-2",
    ]
    assert main([*command, "8", "--loss_type", "ipo"]) == 0
    assert "holds an audit made with another loss." in " ".join(capsys.readouterr().err.split())
    assert Audit.load("runs/audit-model-pairs-3").manifest["loss"]["loss_type"] == ["ipo"]
    assert main([*command, "8", "--output_dir", "runs/audit-model-pairs"]) == 2
    assert "choose another output_dir" in " ".join(capsys.readouterr().err.split())
