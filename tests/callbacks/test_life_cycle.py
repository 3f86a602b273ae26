"""The second run and the third, in one process and in others' company: each has a record of its own, and none is lost."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.harmless import nothing_left
from helpers.trainers import dpo
from helpers.worlds import make_dictionary
from transformers import TrainerCallback

from trl_sae_audit import (
    AuditError,
    FeatureAttributionCallback,
    FeatureShieldCallback,
    Flag,
    GuardCallback,
    RunRecord,
)
from trl_sae_audit.cli.trained_model import check_trained

pytestmark = pytest.mark.newest


def callback(directory: str | Path, **options: Any) -> FeatureAttributionCallback:
    return FeatureAttributionCallback(make_dictionary(), directory, **options)


def test_a_second_run_is_numbered_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        trainer = dpo(tmp_path)
        trainer.add_callback(callback(tmp_path / "record"))
        with caplog.at_level(logging.WARNING, "trl_sae_audit"):
            trainer.train()
    records = [RunRecord.load(tmp_path / name) for name in ("record", "record-2", "record-3")]
    assert [record.status for record in records] == ["finished"] * 3
    assert len({record.manifest["created"] for record in records}) == 3
    said = [record.getMessage() for record in caplog.records if "another run" in record.getMessage()]
    assert len(said) == 2
    assert str(tmp_path / "record-3") in said[1]
    assert "overwrite=True" in said[1]


def test_one_trainer_trains_twice(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    trainer.add_callback(callback(tmp_path / "record"))
    trainer.train()
    trainer.train()
    assert RunRecord.load(tmp_path / "record-2").last_step == 3
    assert nothing_left(trainer)


def test_trainers_that_alternate_with_one_callback(tmp_path: Path) -> None:
    shared = callback(tmp_path / "record")
    trainers = [dpo(tmp_path / name) for name in "ab"]
    for trainer in trainers:
        trainer.add_callback(shared)
    for trainer in (*trainers, *trainers):
        trainer.train()
        assert nothing_left(trainer)
    for name in ("record", "record-2", "record-3", "record-4"):
        assert RunRecord.load(tmp_path / name).last_step == 3


def test_overwrite_replaces_the_earlier_record(tmp_path: Path) -> None:
    created = []
    for _ in range(2):
        trainer = dpo(tmp_path)
        trainer.add_callback(callback(tmp_path / "record", overwrite=True))
        trainer.train()
        created.append(RunRecord.load(tmp_path / "record").manifest["created"])
    assert created[0] < created[1]
    assert not (tmp_path / "record-2").exists()


def test_a_numbered_run_is_resumed_where_it_was(tmp_path: Path) -> None:
    first = dpo(tmp_path / "one")
    first.add_callback(callback(tmp_path / "record"))
    first.train()
    whole = dpo(tmp_path / "whole")
    whole.add_callback(callback(tmp_path / "whole-record"))
    whole.train()
    stopped = dpo(tmp_path / "two", save_strategy="steps", save_steps=2)
    stopped.add_callback(callback(tmp_path / "record"))
    stopped.train()
    resumed = dpo(tmp_path / "two", save_strategy="steps", save_steps=2)
    resumed.add_callback(callback(tmp_path / "record"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "out" / "checkpoint-2"))
    assert not (tmp_path / "record-3").exists()
    record = RunRecord.load(tmp_path / "record-2")
    assert record.last_step == 3
    expected = RunRecord.load(tmp_path / "whole-record").features().sort_values("feature")
    found = record.features().sort_values("feature")
    assert found["attribution"].tolist() == expected["attribution"].tolist()


def test_a_run_that_goes_on_after_its_end_is_known_by_its_last_weights(tmp_path: Path) -> None:
    def run(steps: int, resume: str | None = None) -> Any:
        trainer = dpo(tmp_path, save_strategy="steps", save_steps=2, max_steps=steps)
        trainer.add_callback(callback(tmp_path / "record"))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    earlier = run(2)
    last = run(4, resume=str(tmp_path / "out" / "checkpoint-2"))
    record = RunRecord.load(tmp_path / "record")
    check_trained(record, last, "out", "--after")
    with pytest.raises(AuditError, match="is not the one that the run in"):
        check_trained(record, earlier, "out", "--after")


def test_the_process_may_change_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trainer = dpo(tmp_path)
    trainer.add_callback(callback("runs/dpo", flush_seconds=0.0))
    trainer.add_callback(Elsewhere())
    trainer.train()
    assert RunRecord.load(tmp_path / "here" / "runs" / "dpo").last_step == 3
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_record_is_closed_when_another_callback_fails_at_the_end(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no network")

    trainer = dpo(tmp_path)
    trainer.add_callback(Failing())
    trainer.add_callback(callback(tmp_path / "record"))
    with pytest.raises(RuntimeError, match="no network"):
        trainer.train()
    record = RunRecord.load(tmp_path / "record")
    assert (record.status, record.last_step) == ("finished", 3)
    assert nothing_left(trainer)


def test_the_record_is_written_though_the_trainer_logs_nothing(tmp_path: Path) -> None:
    seen: list[int] = []

    class Looking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(RunRecord.load(tmp_path / "record").last_step)

    trainer = dpo(tmp_path, max_steps=22, logging_strategy="no")
    trainer.add_callback(callback(tmp_path / "record", flush_seconds=0.0))
    trainer.add_callback(Looking())
    trainer.train()
    assert seen == [0] * 9 + [10] * 10 + [20] * 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_used_callback_can_be_copied_and_pickled(duplicate: Callable[[Any], Any], tmp_path: Path) -> None:
    dictionary = make_dictionary()
    shield = FeatureShieldCallback(dictionary, [Flag(dictionary.name, 3, label="x")])
    trainer = dpo(tmp_path / "one")
    for used in (callback(tmp_path / "record"), shield, GuardCallback()):
        trainer.add_callback(used)
    trainer.train()
    again = dpo(tmp_path / "two")
    for used in trainer.callback_handler.callbacks[-3:]:
        again.add_callback(duplicate(used))
    again.train()
    first, second = RunRecord.load(tmp_path / "record"), RunRecord.load(tmp_path / "record-2")
    assert first.features().equals(second.features())
    assert nothing_left(again)


def test_a_copy_made_during_training_observes_nothing(tmp_path: Path) -> None:
    class Copies(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(used)))

    copies: list[FeatureAttributionCallback] = []
    used, trainer = callback(tmp_path / "record"), dpo(tmp_path)
    trainer.add_callback(used)
    trainer.add_callback(Copies())
    trainer.train()
    assert RunRecord.load(tmp_path / "record").status == "finished"
    for each in copies:
        each.detach()
        with pytest.raises(AuditError, match="while no training runs"):
            each.on_step_end(None, None, None)
