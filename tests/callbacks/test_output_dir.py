"""A second run of a script does not overwrite the first one's model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import TrainingArguments

from trl_sae_audit.callbacks.arguments import AttributionArguments
from trl_sae_audit.callbacks.output_dir import take_output_dir


def taken(directory: Path, *, overwrite: bool = False, resume: str | None = None) -> Path:
    training = TrainingArguments(
        str(directory), use_cpu=True, report_to="none", resume_from_checkpoint=resume
    )
    take_output_dir(training, AttributionArguments(["sae"], record_overwrite=overwrite))
    return Path(training.output_dir)


def test_an_empty_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert taken(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run" / "sae_audit").mkdir(parents=True)
    (tmp_path / "run" / "sae_audit" / "manifest.json").touch()
    assert taken(tmp_path / "run") == tmp_path / "run", "a run that was killed before it saved anything"


@pytest.mark.parametrize("left", ["config.json", "adapter_config.json", "checkpoint-10"])
def test_a_directory_with_a_run_is_numbered(
    left: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / left).touch()
    with caplog.at_level(logging.WARNING, "trl_sae_audit"):
        assert taken(tmp_path / "run") == tmp_path / "run-3"
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("trl_sae_audit")]
    assert said.startswith(f"{tmp_path / 'run'} has the model or checkpoints of an earlier run")
    assert str(tmp_path / "run-3") in said
    assert "--record_overwrite true" in said


def test_the_earlier_run_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert taken(tmp_path, overwrite=True) == tmp_path


def test_a_resumed_run_goes_on_where_its_checkpoint_is(tmp_path: Path) -> None:
    for name in ("run", "run-2", "else"):
        (tmp_path / name / "checkpoint-2").mkdir(parents=True)

    def resumed(name: str) -> Path:
        return taken(tmp_path / "run", resume=str(tmp_path / name / "checkpoint-2"))

    assert resumed("run") == tmp_path / "run"
    assert resumed("run-2") == tmp_path / "run-2"
    assert resumed("else") == tmp_path / "run", "its checkpoints go where they are asked to"


def test_the_present_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert taken(Path()) == Path()
    Path("config.json").touch()
    assert taken(Path()) == tmp_path / "run-2"
