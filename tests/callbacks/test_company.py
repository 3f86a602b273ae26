"""In the company of others: their exceptions, their checkpoints, their evaluations; and what a process has set before."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from helpers.harmless import nothing_left
from helpers.shaped import FLAGS as SHAPED
from helpers.shaped import scorer
from helpers.trainers import KINDS, dpo
from helpers.worlds import (
    WORDS,
    make_dictionary,
    make_model,
    make_sae_dictionary,
    make_tokenizer,
    pairs,
    reward_by_length,
)
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from trl_sae_audit import (
    AdaptivePenalty,
    AuditError,
    FeatureAttributionCallback,
    FeatureShieldCallback,
    Flag,
    GuardCallback,
    RunRecord,
    ShapedReward,
    ShapingCallback,
)
from trl_sae_audit.callbacks.dashboards import send_alert
from trl_sae_audit.callbacks.guards import Alert
from trl_sae_audit.trainers.logs import DeferredMetrics, log_kind

pytestmark = pytest.mark.newest

SCORES = (
    "attribution", "standard_error", "share", "token_share", "activation_attribution", "selection", "response_activation",
    "response_frequency",
)  # fmt: skip

Make = Callable[[Path], TrainerCallback]


def attribution(directory: Path, **options: Any) -> FeatureAttributionCallback:
    return FeatureAttributionCallback(make_dictionary(), directory / "record", **options)


def shield(directory: Path) -> FeatureShieldCallback:
    dictionary = make_dictionary()
    return FeatureShieldCallback(dictionary, [Flag(dictionary.name, 3, label="x")])


def shaping(directory: Path) -> ShapingCallback:
    return ShapingCallback(ShapedReward(reward_by_length, scorer(), SHAPED, AdaptivePenalty()))


def guard(directory: Path) -> GuardCallback:
    return GuardCallback()


def with_evaluations(directory: Path, **settings: Any) -> Trainer:
    return KINDS["DPO"].build(directory, settings=settings, eval_dataset=pairs(4, seed=1))


class Failing(TrainerCallback):
    """Raises at an event, in the summary's log alone where that is a log."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._fail)

    def _fail(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "train_runtime" in logs:
            raise RuntimeError("another's")


@pytest.mark.parametrize("make", [attribution, shield, shaping])
@pytest.mark.parametrize(
    ("event", "first"),
    [
        ("on_train_begin", True),
        ("on_epoch_begin", True),
        ("on_evaluate", True),
        ("on_log", True),
        ("on_train_end", True),
        ("on_train_end", False),
    ],
)
def test_nothing_is_left_whenever_another_callback_raises(
    make: Make, event: str, first: bool, tmp_path: Path
) -> None:
    ours, other = make(tmp_path), Failing(event)
    trainer = with_evaluations(tmp_path, eval_strategy="epoch", eval_on_start=True)
    for each in (ours, other) if first else (other, ours):
        trainer.add_callback(each)
    with pytest.raises(RuntimeError, match="another's"):
        trainer.train()
    assert nothing_left(trainer)
    if (tmp_path / "record").exists():
        status = "finished" if event == "on_train_end" else "failed"
        assert RunRecord.load(tmp_path / "record").status == status


@pytest.mark.parametrize("make", [attribution, shield, shaping, guard])
def test_one_that_is_added_twice_is_told_at_the_beginning(make: Make, tmp_path: Path) -> None:
    twice = make(tmp_path)
    trainer = dpo(tmp_path)
    trainer.add_callback(twice)
    trainer.add_callback(twice)
    with pytest.raises(AuditError, match="added to the trainer twice"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert nothing_left(trainer)


def test_a_dashboard_that_fails_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def add_text(self, name: str, *args: Any) -> None:
            if name.startswith("train/sae"):
                raise OSError("disk full")

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    trainer = dpo(tmp_path)
    for each in (TensorBoardCallback(tb_writer=Full()), attribution(tmp_path)):
        trainer.add_callback(each)
    trainer.train()
    assert RunRecord.load(tmp_path / "record").status == "finished"
    assert "TensorBoardCallback could not be told (OSError: disk full)" in caplog.text


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_an_alert_that_does_not_arrive_is_logged(
    library: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = pytest.importorskip(library)
    lost = module.errors.CommError("lost") if library == "wandb" else httpx.ConnectError("lost")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise lost

    if library == "wandb":
        monkeypatch.setattr(module, "run", SimpleNamespace(alert=fail))
        reporter = object.__new__(WandbCallback)
    else:
        monkeypatch.setattr(module, "alert", fail)
        reporter = object.__new__(TrackioCallback)
    send_alert([reporter], "agreeing", "rises")
    assert f"{type(reporter).__name__} could not be told ({type(lost).__name__}: lost)" in caplog.text


class Derived(FeatureAttributionCallback):
    """A class of the user's own."""


def two(directory: Path) -> list[FeatureAttributionCallback]:
    return [
        FeatureAttributionCallback(make_dictionary(name="one"), directory / "one"),
        Derived(make_dictionary(seed=5, name="two"), directory / "two"),
    ]


def test_a_derived_class_has_its_own_part_of_a_checkpoint(tmp_path: Path) -> None:
    for resumed in (None, str(tmp_path / "out" / "checkpoint-2")):
        trainer = dpo(tmp_path, save_strategy="steps", save_steps=2)
        for each in two(tmp_path):
            trainer.add_callback(each)
        trainer.train(resume_from_checkpoint=resumed)
        if resumed is None:
            whole = [RunRecord.load(tmp_path / name).features() for name in ("one", "two")]
    parts = [path.name for path in (tmp_path / "out" / "checkpoint-2").glob("sae_audit_*")]
    assert sorted(parts) == ["sae_audit_0", "sae_audit_1"]
    for name, expected in zip(("one", "two"), whole, strict=True):
        assert RunRecord.load(tmp_path / name).features().equals(expected)


def test_a_run_resumes_from_a_checkpoint_of_any_place_and_name(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(attribution(tmp_path))
    trainer.train()
    expected = RunRecord.load(tmp_path / "record").features()
    shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "kept")
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "record")
    resumed = dpo(tmp_path)
    resumed.add_callback(attribution(tmp_path))
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert RunRecord.load(tmp_path / "record").features().equals(expected)


def test_a_trial_s_checkpoint_is_in_the_trial_s_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = dpo(tmp_path, save_strategy="steps", save_steps=2)
    # as in a hyperparameter search, which needs optuna
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / "out" / "run-7"))
    trainer.add_callback(attribution(tmp_path))
    trainer.add_callback(shaping(tmp_path))
    trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    checkpoint = tmp_path / "out" / "run-7" / "checkpoint-2"
    assert (checkpoint / "sae_audit_0" / "manifest.json").is_file()
    assert (checkpoint / "sae_shaping.json").is_file()


def test_an_alert_of_a_run_that_was_left_is_not_the_next_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history[-1]["left"] = True
            raise KeyboardInterrupt

    guarded, left, trainer = GuardCallback(), Left(), dpo(tmp_path)
    alert = Alert("trend", "sae/x/attribution", 1, 1.0, "It rises.")
    monkeypatch.setattr(GuardCallback, "_check", lambda *_: [alert])
    trainer.add_callback(guarded)
    trainer.add_callback(left)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert pickle.loads(pickle.dumps(guarded)).alerts == [alert]
    monkeypatch.setattr(GuardCallback, "_check", lambda *_: [])
    trainer.remove_callback(left)
    trainer.train()
    assert not any("guard/alerts" in entry for entry in trainer.state.log_history)
    assert nothing_left(trainer)


def test_metrics_go_to_the_trainer_they_are_of() -> None:
    class Logging:
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def log(self, logs: dict[str, float]) -> None:
            self.seen.append(dict(logs))

    first, second, metrics = Logging(), Logging(), DeferredMetrics()
    metrics.add(first, {"reward": 1.0})  # type: ignore[arg-type]
    metrics.add(second, {"reward": 3.0})  # type: ignore[arg-type]
    for trainer in (first, second):
        trainer.log({"loss": 0.5})
    assert first.seen == [{"loss": 0.5}]
    assert second.seen == [{"loss": 0.5, "reward": 3.0}]


@pytest.mark.parametrize(
    ("logs", "kind"),
    [
        ({"loss": 1.0, "learning_rate": 0.1}, "training"),
        ({"eval_loss": 1.0}, "evaluation"),
        ({"test_loss": 1.0, "test_runtime": 0.1, "test_samples_per_second": 3.0}, "evaluation"),
        ({"loss": 1.0, "step_runtime": 0.1}, "training"),
        ({"train_runtime": 1.0, "train_loss": 0.1}, "summary"),
    ],
)
def test_what_is_logged(logs: dict[str, float], kind: str) -> None:
    assert log_kind(logs) == kind


def test_an_evaluation_under_another_name_takes_no_means_of_the_training(tmp_path: Path) -> None:
    class Tests(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                trainer.evaluate(metric_key_prefix="test")

    trainer = with_evaluations(tmp_path, logging_steps=2)
    trainer.add_callback(Tests())
    trainer.add_callback(attribution(tmp_path))
    trainer.train()
    evaluated = next(entry for entry in trainer.state.log_history if "test_loss" in entry)
    trained = next(entry for entry in trainer.state.log_history if entry["step"] == 2)
    assert not any(name.startswith("sae/") for name in evaluated)
    assert "sae/grad_norm" in trained


def test_a_batch_without_names(tmp_path: Path) -> None:
    class Unnamed(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            ids, labels = inputs
            return model(input_ids=ids, labels=labels).loss

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return ids, ids

    rows = [{"input_ids": list(range(4 + n, 10 + n))} for n in range(4)]
    args = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = Unnamed(
        make_model(make_tokenizer()),
        args,
        collate,
        rows,
        callbacks=[attribution(tmp_path)],  # type: ignore[arg-type]
    )
    trainer.train()
    assert RunRecord.load(tmp_path / "record").last_step == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_process_may_have_another_default_type(dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    for name, default in (("plain", torch.float32), ("other", dtype)):
        trainer = dpo(tmp_path / name, max_steps=1)
        callback = FeatureAttributionCallback(
            make_sae_dictionary(),
            tmp_path / name / "record",
            watch={"one": 1},
            probe=[" ".join(WORDS[:5])],
            token_scores=True,
        )
        for each in (callback, shield(tmp_path)):
            trainer.add_callback(each)
        torch.set_default_dtype(default)
        try:
            trainer.train()
        finally:
            torch.set_default_dtype(torch.float32)
        record = RunRecord.load(tmp_path / name / "record")
        found.append((record.features().set_index("feature").sort_index(), record.table("drift")))
    features, others = found[0][0], found[1][0]
    for score in SCORES:  # TRL's own loss is rounded a little otherwise
        largest = features[score].abs().max()
        assert (others[score] - features[score]).abs().max() < 2e-3 * largest, score
    assert found[0][1].equals(found[1][1])
