"""TensorBoard, W&B and trackio show the metrics and a table of the top features: read in the files they write."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from helpers.worlds import make_sae_dictionary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trl_sae_audit import FeatureAttributionCallback, RunRecord
from trl_sae_audit.callbacks.dashboards import ROWS, as_markdown
from trl_sae_audit.record.rollouts import COLUMNS, read_rollouts

METRICS = {"train/sae/one/attribution", "train/sae/grad_norm", "train/sae/top1/feature"}
SIDES = ["chosen", "rejected"]


class Run(NamedTuple):
    """One DPO run that reported to all three."""

    directory: Path
    model: torch.nn.Module
    expected: pd.DataFrame
    wandb_summary: dict[str, Any]


def callback(directory: Path) -> FeatureAttributionCallback:
    return FeatureAttributionCallback(make_sae_dictionary(), directory / "record", watch={"one": 1, "a|b": 2})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    import wandb
    from helpers.trainers import dpo

    directory = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DIR", str(directory))
        trainer = dpo(directory, report_to=["tensorboard", "wandb", "trackio"], project="audited")
        trainer.add_callback(callback(directory))
        trainer.train()
        summary = dict(wandb.run.summary)
        wandb.finish()
        wandb.teardown()  # the next run has another directory
    shutil.move(os.environ["TRACKIO_DIR"], directory / "trackio")
    return Run(directory, trainer.model, RunRecord.load(directory / "record").features(), summary)


def check_table(rows: list[dict[str, Any]], run: Run) -> None:
    """The rows are the head of the record's features."""
    assert len(rows) == ROWS
    expected = run.expected.head(ROWS)
    assert any(row["words"] for row in rows)
    for name in ("feature", "words", "label", "attribution", "q_value", "trend", *SIDES):
        assert [row[name] for row in rows] == pytest.approx(expected[name].tolist(), nan_ok=True), name


@pytest.mark.newest
def test_tensorboard(run: Run) -> None:
    (events,) = (run.directory / "out").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    assert set(board.Tags()["scalars"]) >= METRICS
    (text,) = board.Tensors("train/sae/features/text_summary")
    assert text.step == 3
    header, _, *rows = text.tensor_proto.string_val[0].decode().splitlines()
    assert header.split(" | ")[-2:] == ["rejected", "trend |"]
    cells = [row.removeprefix("| ").split(" | ")[:2] for row in rows]
    first = run.expected.head(ROWS)
    assert cells == [[str(n), words] for n, words in zip(first["feature"], first["words"], strict=True)]


@pytest.mark.newest
def test_wandb(run: Run) -> None:
    assert run.wandb_summary.keys() >= METRICS
    (stored,) = run.directory.glob("wandb/offline-run-*/files/media/table/train/sae/features*.table.json")
    table = json.loads(stored.read_text())
    check_table([dict(zip(table["columns"], row, strict=True)) for row in table["data"]], run)


@pytest.mark.newest
def test_trackio(run: Run) -> None:
    (stored,) = run.directory.glob("trackio/audited*.db")
    with sqlite3.connect(stored) as connection:
        logged = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    assert logged[0].keys() >= METRICS
    table = logged[-1]["train/sae/features"]
    assert (table["_type"], logged[-1]["train/global_step"]) == ("trackio.table", 3)
    check_table(table["_value"], run)


@pytest.mark.newest
@pytest.mark.parametrize("shown", [True, False])
def test_trackio_traces_are_the_answers_on_the_record(tmp_path: Path, shown: bool) -> None:
    from helpers.trainers import KINDS

    settings = {"max_steps": 12, "logging_steps": 6, "report_to": "trackio"}
    settings |= {"project": f"traced-{shown}", "log_completions": shown}
    trainer = KINDS["GRPO"].build(tmp_path, settings=settings)
    trainer.add_callback(FeatureAttributionCallback(make_sae_dictionary(), tmp_path / "record"))
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    expected = read_rollouts(*map(record.table, COLUMNS))
    assert {each.when for each in expected} == {"before", "after"}
    (stored,) = Path(os.environ["TRACKIO_DIR"]).glob(f"traced-{shown}*.db")
    with sqlite3.connect(stored) as connection:
        query = "SELECT messages, metadata FROM traces WHERE key = 'train/sae/rollouts' ORDER BY trace_index"
        stored_traces = [tuple(map(json.loads, row)) for row in connection.execute(query)]
    told = [
        (*((message["role"], message["content"]) for message in messages), metadata["when"], metadata["step"])
        for messages, metadata in stored_traces
    ]
    assert told == [
        (("user", each.prompt), ("assistant", "".join(each.pieces)), each.when, each.sampled)
        for each in (expected if shown else ())
    ]


@pytest.mark.newest
def test_reporting_changes_no_weight_and_needs_no_absent_package(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.trainers import dpo

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    silent = dpo(tmp_path)
    silent.add_callback(callback(tmp_path))
    silent.train()
    plain = dpo(tmp_path)
    plain.train()
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, silent.model.state_dict()[name])
        assert torch.equal(weight, run.model.state_dict()[name])


@pytest.mark.ppo
def test_ppo_reports_its_own_sides(tmp_path: Path) -> None:
    from helpers.ppo import ppo

    trainer = ppo(tmp_path, report_to=["tensorboard"])
    trainer.add_callback(callback(tmp_path))
    trainer.train()
    board = EventAccumulator(str(next((tmp_path / "out").rglob("events.out.tfevents.*")).parent))
    board.Reload()
    (text,) = board.Tensors("train/sae/features/text_summary")
    assert "| reinforced | suppressed |" in text.tensor_proto.string_val[0].decode()


def test_a_label_cannot_break_the_table() -> None:
    assert (
        as_markdown(pd.DataFrame({"label": ["a|b"], "x": [0.123456]})).splitlines()[2] == "| a\\|b | 0.1235 |"
    )


def test_an_unknown_number_is_a_dash() -> None:
    assert as_markdown(pd.DataFrame({"x": [float("nan")], "y": [0]})).splitlines()[2] == "| – | 0 |"
