"""Guards on logs that are made up, and on real trainers, PPO among them."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.worlds import make_dictionary
from transformers import Trainer, TrainerCallback

from trl_sae_audit import AuditError, FeatureAttributionCallback, GuardCallback, RunRecord, TrainingStopped
from trl_sae_audit.callbacks.guards import TRENDS

RNG = np.random.default_rng(0)


def rules(guard: GuardCallback, logs: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """What a guard alerts of in these logs: (rule, metric, log)."""
    for number, entry in enumerate(logs, start=1):
        guard.alerts += list(guard._check(entry, number))
    return [(alert.rule, alert.metric, alert.global_step) for alert in guard.alerts]


def rising(metric: str, n: int = 20) -> list[dict[str, Any]]:
    return [{metric: 0.1 * step + 0.05 * float(RNG.normal())} for step in range(n)]


@pytest.mark.parametrize(
    "metric",
    ["sae/flattery/attribution", "sae/tiny/flattery/drift", "shaping/flattery/score"],
)
def test_a_rising_feature_is_seen_once(metric: str) -> None:
    found = rules(GuardCallback(trends=TRENDS), rising(metric))
    assert [(rule, name) for rule, name, _ in found] == [("trend", metric)]
    assert found[0][2] == 10  # as soon as it is tested


@pytest.mark.parametrize("score", ["drift", "generation_drift"])
def test_a_drift_adds_up_and_is_no_alert_unless_asked_for(score: str) -> None:
    metric = f"sae/flattery/{score}"
    assert rules(GuardCallback(), rising(metric)) == []
    assert len(rules(GuardCallback(trends=[score]), rising(metric))) == 1
    assert rules(GuardCallback(trends=[score]), rising("sae/flattery/attribution")) == []


def test_what_falls_or_wanders_is_not_a_trend() -> None:
    falling = [{"sae/flattery/attribution": -value["m"]} for value in rising("m")]
    assert rules(GuardCallback(), falling) == []
    alarms = 0
    for seed in range(50):
        noise = np.random.default_rng(seed).normal(size=30)
        alarms += len(rules(GuardCallback(), [{"sae/flattery/attribution": float(value)} for value in noise]))
    assert alarms <= 5


def test_other_metrics_and_other_labels_do_not_count() -> None:
    for metric in ("loss", "sae/top1/attribution", "sae/flattery/share", "shaping/penalty"):
        assert rules(GuardCallback(), rising(metric)) == []
    assert rules(GuardCallback(watch=["length"]), rising("sae/flattery/attribution")) == []
    assert len(rules(GuardCallback(watch=["flattery"]), rising("sae/flattery/attribution"))) == 1


def test_a_penalty_that_dominates() -> None:
    share = "shaping/penalty_share"
    once = [{share: value} for value in (0.2, 2.0, 0.3, 0.2)]
    assert rules(GuardCallback(), once) == []
    often = [{share: value} for value in (0.2, 1.2, 1.2, 1.2, 1.2)]
    assert rules(GuardCallback(), often) == [("penalty", share, 4)]
    assert rules(GuardCallback(penalty_share=None), often) == []


def test_a_dictionary_that_stops_fitting() -> None:
    logs = [{"sae/fvu": value} for value in (0.1, 0.2, 0.15, 0.2, 0.2, 0.3, 0.5, 0.6, 0.6)]
    assert rules(GuardCallback(), logs) == [("fit", "sae/fvu", 8)]
    assert rules(GuardCallback(fvu_rise=0.5), logs) == []
    assert rules(GuardCallback(fvu_rise=None), logs) == []


class Writing(TrainerCallback):
    """Puts a metric into what the trainer logs, as attribution does."""

    def __init__(self, trainer: Trainer, metric: str, values: list[float]) -> None:
        original, left = trainer.log, iter(values)

        def log(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if "train_runtime" not in logs:
                logs[metric] = next(left)
            original(logs, *args, **kwargs)

        trainer.log = log


@pytest.mark.newest
@pytest.mark.parametrize("stop", [False, True, ["penalty"], ["fit"]])
def test_a_trainer_is_warned_and_stopped_on_request(
    stop: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from helpers.trainers import dpo

    trainer = dpo(tmp_path, max_steps=8, logging_steps=1)
    Writing(trainer, "shaping/penalty_share", [0.1] + [1.3] * 7)
    guard = GuardCallback(stop=stop)
    trainer.add_callback(guard)
    trainer.train()
    stopped = stop is True or stop == ["penalty"]
    assert trainer.state.global_step == (4 if stopped else 8)
    assert [alert.global_step for alert in guard.alerts] == [4]
    assert "above 1" in caplog.text
    entries = [entry for entry in trainer.state.log_history if "shaping/penalty_share" in entry]
    assert [entry.get("guard/penalty") for entry in entries[:5]] == [None, None, None, 1.0, None][
        : len(entries)
    ]
    if not stopped:
        assert entries[4]["guard/alerts"] == 1.0


@pytest.mark.newest
def test_an_alert_reaches_the_dashboards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from helpers.trainers import dpo

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    project = f"guarded-{tmp_path.name}"
    trainer = dpo(tmp_path, max_steps=5, logging_steps=1, report_to=["wandb", "trackio"], project=project)
    Writing(trainer, "shaping/penalty_share", [1.3] * 5)
    guard = GuardCallback()
    trainer.add_callback(guard)
    trainer.train()
    wandb.finish()
    wandb.teardown()  # waits for the process that writes
    (sentence,) = (alert.sentence for alert in guard.alerts)
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{project}.db") as connection:
        stored = connection.execute("SELECT title, text, level FROM alerts").fetchall()
    assert stored == [("penalty: shaping/penalty_share", sentence, "warn")]
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"penalty: shaping/penalty_share" in written.read_bytes()


@pytest.mark.ppo
def test_ppo_is_stopped_too(tmp_path: Path) -> None:
    from helpers.ppo import ppo

    trainer = ppo(tmp_path, total_episodes=32)
    Writing(trainer, "shaping/penalty_share", [3.0] * 8)
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    guard = GuardCallback(stop=True)
    trainer.add_callback(guard)
    start = trainer.policy_model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with pytest.raises(TrainingStopped, match="at step 3 by a guard") as stopped:
        trainer.train()
    assert stopped.value.alerts == guard.alerts
    assert trainer.state.global_step == 3
    assert not torch.equal(start, trainer.policy_model.model.layers[0].mlp.up_proj.weight)
    assert RunRecord.load(tmp_path / "record").status == "finished"
    assert not hasattr(trainer.log, "active")  # only the test's own log is left on the trainer


@pytest.mark.ppo
def test_ppo_goes_on_without_a_request(tmp_path: Path) -> None:
    from helpers.ppo import ppo

    trainer = ppo(tmp_path, total_episodes=16)
    Writing(trainer, "shaping/penalty_share", [3.0] * 8)
    guard = GuardCallback()
    trainer.add_callback(guard)
    trainer.train()
    assert trainer.state.global_step == 4
    assert len(guard.alerts) == 1
    assert trainer.state.log_history[2]["guard/penalty"] == 1.0
    assert trainer.state.log_history[3]["guard/alerts"] == 1.0


@pytest.mark.newest
def test_it_reads_what_attribution_logs(tmp_path: Path) -> None:
    from helpers.trainers import dpo

    trainer = dpo(tmp_path, max_steps=4, logging_steps=1)
    guard = GuardCallback(watch=["one"])
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record", watch={"one": 1}))
    trainer.add_callback(guard)
    trainer.train()
    seen = list(guard._series)
    assert "sae/one/attribution" in seen
    assert len(guard._series["sae/one/attribution"].latest) == 4


@pytest.mark.newest
def test_another_run_begins_anew(tmp_path: Path) -> None:
    from helpers.trainers import dpo

    guard, trainer = GuardCallback(), dpo(tmp_path)
    trainer.add_callback(guard)
    rules(guard, rising("sae/flattery/attribution"))
    assert guard.alerts
    trainer.train()
    assert not guard.alerts


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stop": ["trends"]}, "list of trend"),
        ({"stop": "trend"}, "list of trend"),
        ({"trends": ["drifts"]}, "list of attribution, score, drift"),
        ({"trends": "drift"}, "list of attribution"),
        ({"watch": "flattery"}, "list of labels"),
        ({"trend_p": 0.0}, "trend_p"),
        ({"least_logs": 3}, "least_logs"),
        ({"window": 5}, "window"),
        ({"penalty_share": 0.0}, "penalty_share"),
        ({"fvu_rise": -1.0}, "fvu_rise"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(AuditError, match=match):
        GuardCallback(**options)
