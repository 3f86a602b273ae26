"""The drift in generations of whole trainings: recorded, logged, resumed, and harmless."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.harmless import nothing_left
from helpers.trainers import BUILDERS, dpo
from helpers.worlds import D_SAE, make_dictionary, make_sae_dictionary
from peft import LoraConfig
from rich.console import Console
from transformers import Trainer, TrainerCallback

from trl_sae_audit import FeatureAttributionCallback, RunRecord, Sampling
from trl_sae_audit.callbacks.generations import GenerationDrift
from trl_sae_audit.callbacks.summary import print_summary
from trl_sae_audit.errors import AuditError
from trl_sae_audit.record.over_time import read_over_time
from trl_sae_audit.report import write_report
from trl_sae_audit.verification.measured import read_answers, sample_answers

pytestmark = pytest.mark.newest

SHORT = Sampling(answers=2, max_new_tokens=5)
PROMPTS = ["w1 w2 w3", "w4", "w5 w6"]
GENERATING = sorted(set(BUILDERS) - {"Reward"})


def callback(directory: Path, **more: Any) -> FeatureAttributionCallback:
    given: dict[str, Any] = {"watch": {"one": 1}, "generations": SHORT, "generation_steps": 2}
    return FeatureAttributionCallback(make_dictionary(), directory / "record", **given | more)


def run(trainer: Trainer, directory: Path, resume: str | None = None, **more: Any) -> RunRecord:
    trainer.add_callback(callback(directory, **more))
    trainer.train(resume_from_checkpoint=resume)
    return RunRecord.load(directory / "record")


@pytest.mark.parametrize("name", GENERATING)
def test_weights_are_bit_identical_and_every_look_is_recorded(name: str, tmp_path: Path) -> None:
    plain = BUILDERS[name](tmp_path / "plain")
    plain.train()
    watched = BUILDERS[name](tmp_path / "watched")
    record = run(watched, tmp_path, generation_prompts=PROMPTS)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[key]), key
    assert nothing_left(watched)
    drift = record.drift()
    assert drift.index.tolist() == [2, 3]
    assert drift.columns.tolist() == list(range(D_SAE))
    assert (drift.abs().max(axis=1) > 0).all()
    looks = record.table("generation_looks")
    assert looks[["step", "global_step", "answers", "prompts"]].to_numpy().tolist() == [
        [2, 2, 6, 3],
        [3, 3, 6, 3],
    ]
    assert looks["effective_sample_size"].between(1, 6).all()


def test_features_have_the_last_look_with_its_interval_and_the_log_that_of_watched_ones(
    tmp_path: Path,
) -> None:
    trainer = dpo(tmp_path, logging_steps=1)
    record = run(trainer, tmp_path)
    features = record.features().set_index("feature").sort_index()
    np.testing.assert_array_equal(features["generation_drift"], record.drift().loc[3])
    assert (features["generation_drift_low"] <= features["generation_drift"]).all()
    assert (features["generation_drift"] <= features["generation_drift_high"]).all()
    spread = record.table("generation_features").set_index("feature")["spread"]
    unit = np.sqrt(spread**2 + (2 * spread.quantile(0.5, interpolation="lower")) ** 2)
    np.testing.assert_allclose(
        features["generation_effect_size"], features["generation_drift"] / unit, rtol=1e-6
    )
    check_that_drift_leads(record)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    name = "sae/one/generation_drift"
    assert [name in entry for entry in logged] == [False, True, True]
    assert logged[-1][name] == pytest.approx(features["generation_drift"][1])
    effective = record.table("generation_looks")["effective_sample_size"]
    assert logged[-1]["sae/generations/effective_sample_size"] == pytest.approx(effective.iloc[-1])


def check_that_drift_leads(record: RunRecord) -> None:
    """In the order of the features, in print(record), in the model card, and in what is printed when training ends."""
    features = record.features()
    effect = features["generation_effect_size"]
    assert effect.abs().is_monotonic_decreasing
    numbers = [line.split()[0] for line in str(record).splitlines() if line.split()[:1]]
    assert [int(word) for word in numbers if word.isdigit()] == features["feature"].head(10).tolist()
    first = features.loc[effect.idxmax()]
    half = (first["generation_drift_high"] - first["generation_drift_low"]) / 2
    half *= first["generation_effect_size"] / first["generation_drift"]
    row = next(
        line for line in record.model_card().splitlines() if line.startswith(f"| {first['feature']} |")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    selected = "selection" in features and np.isfinite(first["selection"])
    shown = [f"{first['generation_effect_size']:+.3g}", f"{half:.2g}"]
    assert cells[2:] == [*shown, *([f"{first['selection']:+.3g}"] if selected else [])]
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(record.directory, console=console)
    lines = console.export_text().splitlines()
    head = next(line for line in lines if "±" in line).split()
    assert head[:2] == ["feature", "drift"]
    top = next(line.split() for line in lines if line.split()[:1] == [str(first["feature"])])
    assert top[1:3] == shown
    narrow = Console(width=80, record=True, file=io.StringIO())
    print_summary(record.directory, console=narrow)
    lines = narrow.export_text().splitlines()
    kept = next(line for line in lines if "±" in line).split()
    assert kept[:2] == head[:2]
    omitted = [each for each in head if each not in kept]
    named = " ".join(lines).partition("Not shown in 80 columns: ")[2].partition(".")[0].split(", ")
    assert omitted == [word for each in named for word in each.split()]


def test_a_resumed_run_goes_on_with_the_same_answers_and_to_the_same_numbers(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = run(dpo(tmp_path / "whole", **saved), tmp_path / "whole")
    first = dpo(tmp_path / "parts", **saved)
    first.add_callback(callback(tmp_path / "parts"))
    first.train()
    again = run(
        dpo(tmp_path / "parts", **saved),
        tmp_path / "parts",
        resume=str(tmp_path / "parts" / "out" / "checkpoint-3"),
    )
    for table in ("generations", "generation_drift", "generation_looks"):
        pd.testing.assert_frame_equal(whole.table(table), again.table(table))


def test_a_resumed_run_in_a_new_record_says_from_where_it_measures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    run(dpo(tmp_path, **saved), tmp_path)
    with caplog.at_level(logging.WARNING):
        record = run(dpo(tmp_path, **saved), tmp_path / "new", resume=str(tmp_path / "out" / "checkpoint-3"))
    assert "sampled from the model as it is after step 3" in caplog.text
    assert record.table("generations")["step"].unique().tolist() == [3]
    assert record.drift().index.tolist() == [4, 6]


def test_with_an_adapter(tmp_path: Path) -> None:
    trainer = BUILDERS["DPO"](tmp_path)
    adapted = type(trainer)(
        trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=trainer.processing_class,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    record = run(adapted, tmp_path, generation_prompts=PROMPTS)
    assert (record.drift().abs().max(axis=1) > 0).all()


def far(directory: Path, **more: Any) -> tuple[Trainer, RunRecord]:
    """A run that ends far from its start."""
    trainer = dpo(directory, learning_rate=0.05, **{"max_steps": 6, **more})
    return trainer, run(trainer, directory, generation_steps=1, generation_prompts=PROMPTS)


def test_far_from_the_start_a_warning_says_so_once_and_the_answers_are_sampled_again_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer, record = far(tmp_path)
    assert caplog.text.count("until the answers are sampled again") == 1
    looks = record.table("generation_looks")
    assert looks["sampled_again"].tolist() == [False] * 5 + [True]
    assert looks["trusted"].tolist()[-2:] == [False, True]
    check_drift_of_today(trainer, record)


def check_drift_of_today(trainer: Trainer, record: RunRecord) -> None:
    """The last drift is what the trained model reads in answers it is asked for, less what it reads in those of the start."""
    tokenizer, dictionary = trainer.processing_class, make_dictionary()
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    now = read_answers(
        trainer.model, tokenizer, dictionary, sample_answers(trainer.model, tokenizer, rows, sampling=SHORT)
    )
    kept = record.table("generations").groupby(["prompt", "answer"])["token"].apply(list)
    asked = record.table("generation_prompts").groupby("prompt")["token"].apply(list)
    start = [(PROMPTS[prompt], asked[prompt], answer) for (prompt, _), answer in kept.items()]
    before = read_answers(trainer.model, tokenizer, dictionary, start)
    found = record.drift().loc[6]
    assert found.abs().max() > 0.01
    np.testing.assert_allclose(found, now.mean() - before.mean(), atol=1e-5)
    features = record.features().set_index("feature")
    assert features.loc[found.index, "generation_effect_size"].notna().all()


@pytest.mark.parametrize(
    ("every", "looks"), [(4, [[4, False], [6, True]]), (3, [[3, False], [6, False], [6, True]])]
)
def test_a_run_that_is_stopped_far_from_its_start_samples_again_too(
    every: int, looks: list[Any], tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 6

    trainer = dpo(tmp_path, learning_rate=0.05, max_steps=9)
    trainer.add_callback(Stop())
    record = run(trainer, tmp_path, generation_steps=every, generation_prompts=PROMPTS)
    assert record.table("generation_looks")[["step", "sampled_again"]].to_numpy().tolist() == looks
    check_drift_of_today(trainer, record)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), AuditError("too many")])
def test_where_the_answers_cannot_be_sampled_again_training_ends_well_and_the_log_says_so(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: GenerationDrift) -> None:
        raise error

    monkeypatch.setattr(GenerationDrift, "_answers_again", fail)
    with caplog.at_level(logging.WARNING):
        trainer, record = far(tmp_path)
    assert trainer.state.global_step == 6
    assert record.status == "finished"
    assert f"could not be sampled again ({error})" in caplog.text
    assert caplog.text.count("could not be sampled again") == 1
    looks = record.table("generation_looks")
    assert looks["step"].is_unique
    assert not looks["sampled_again"].any()
    assert not looks["trusted"].iloc[-1]
    assert record.features()["generation_drift"].notna().all()


def test_a_feature_that_only_the_last_answers_show_is_unknown_before_and_in_the_report(
    tmp_path: Path,
) -> None:
    trainer = dpo(tmp_path, learning_rate=0.05, max_steps=6)
    trainer.add_callback(
        FeatureAttributionCallback(
            make_sae_dictionary(name="tiny"),
            tmp_path / "record",
            generations=Sampling(answers=1, max_new_tokens=4),
            generation_prompts=PROMPTS[:2],
            generation_steps=2,
        )
    )
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    new = record.drift().columns[record.drift().loc[4].isna() & record.drift().loc[6].notna()]
    assert len(new)
    over_time = read_over_time(record, "tiny", record.totals())["generation_drift"]
    assert np.isnan(over_time.values[:-1, new]).all()
    assert np.isfinite(over_time.values[-1, new]).all()
    page = write_report(tmp_path / "record", tmp_path / "report.html").read_text()
    assert "Drift in generations" in page


def test_near_the_start_nothing_is_sampled_again(tmp_path: Path) -> None:
    record = run(dpo(tmp_path), tmp_path, generation_prompts=PROMPTS)
    assert not record.table("generation_looks")["sampled_again"].any()


def test_a_feature_that_no_answer_of_the_start_shows_has_the_least_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, record = far(tmp_path)
    spread = record.table("generation_features").set_index("feature")["spread"]
    drift = record.drift().loc[6]
    with_all = record.drift_effects().loc[6]
    hidden = int(drift.abs().idxmax())
    rows = record.table("generation_features")
    table = record.table
    monkeypatch.setattr(
        record,
        "table",
        lambda name: rows[rows["feature"] != hidden] if name == "generation_features" else table(name),
    )
    least = 2 * spread.drop(hidden).quantile(0.5, interpolation="lower")
    assert record.drift_effects().loc[6, hidden] == pytest.approx(drift[hidden] / least)
    assert with_all[hidden] == pytest.approx(
        drift[hidden] / np.hypot(spread[hidden], 2 * spread.quantile(0.5, interpolation="lower"))
    )


def test_a_run_without_generations_has_no_drift(tmp_path: Path) -> None:
    record = run(dpo(tmp_path), tmp_path, generations=None)
    assert "generation_drift" not in record.features()
    with pytest.raises(AuditError, match="no drift in generations: pass generations="):
        record.drift()


def test_prompts_without_generations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="pass generations="):
        callback(tmp_path, generations=None, generation_prompts=PROMPTS)


def test_a_reward_trainer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="generates nothing"):
        run(BUILDERS["Reward"](tmp_path), tmp_path)
    assert not (tmp_path / "record").exists()
