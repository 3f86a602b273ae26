"""`trl-sae-audit demo`, shortened, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_sae_audit import RunRecord, cli

pytestmark = pytest.mark.newest


def test_demo_ends_with_the_table_and_replaces_only_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "demo"
    command = ["demo", "--output_dir", str(directory), "--steps", "4", "--pairs", "64"]
    for _ in range(2):
        assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "What the run taught" in shown
    record = RunRecord.load(directory / "record")
    assert (record.status, record.last_step) == ("finished", 4)
    assert {"lab-model", "reward_model", "dictionary", "pairs.jsonl"} <= {
        path.name for path in directory.iterdir()
    }


def test_demo_refuses_a_directory_that_is_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    assert cli.main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "was not made by the demo" in capsys.readouterr().err
    assert (tmp_path / "precious").exists()
