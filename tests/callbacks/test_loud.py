"""What would make the scores wrong ends the run before its first optimizer step, with one sentence."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trainers import dpo
from helpers.worlds import D_MODEL, D_SAE, make_dictionary, make_model, make_tokenizer
from transformers import Trainer, TrainingArguments

from trl_sae_audit import AuditError, FeatureAttributionCallback, FeatureDictionary, RunRecord

pytestmark = pytest.mark.newest


def refused(trainer: Trainer, callback: FeatureAttributionCallback) -> str:
    """The sentence with which training is refused, after checking that no weight has moved."""
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.add_callback(callback)
    with pytest.raises(AuditError) as caught:
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    message = str(caught.value)
    assert len(message) > 40
    assert message.endswith((".", ")."))
    return message


def dictionary_of(hook_point: str, d_model: int = D_MODEL) -> FeatureDictionary:
    return FeatureDictionary(torch.randn(8, d_model), hook_point, "other")


@pytest.mark.parametrize(
    ("hook_point", "d_model", "said"),
    [
        ("transformer.h.9", D_MODEL, "is not in LlamaForCausalLM"),
        ("model.layers.9", D_MODEL, "has 3 layers"),
        ("blocks.9.hook_resid_post", D_MODEL, "has 3 layers"),
        ("blocks.1.hook_mlp_out", D_MODEL, "residual stream"),
        ("input_layernorm", D_MODEL, "ambiguous"),
        ("model.layers.1", 48, "reads 48 dimensions"),
        ("model.layers.1.mlp.up_proj", D_MODEL, "writes 64 dimensions"),
        ("model.rotary_emb", D_MODEL, "writes 8 dimensions"),
    ],
)
def test_dictionary_that_does_not_fit(hook_point: str, d_model: int, said: str, tmp_path: Path) -> None:
    message = refused(
        dpo(tmp_path), FeatureAttributionCallback(dictionary_of(hook_point, d_model), tmp_path / "record")
    )
    assert said in message


@pytest.mark.parametrize("watch", [{"one": D_SAE}, {"one": -1}, {"one": ("nobody", 1)}, {"one": 1, "uno": 1}])
def test_watched_feature_that_does_not_exist(watch: dict[str, Any], tmp_path: Path) -> None:
    callback = FeatureAttributionCallback(make_dictionary(), tmp_path / "record", watch=watch)
    assert "atch" in refused(dpo(tmp_path), callback)


def test_two_callbacks_on_one_directory(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(seed=3), tmp_path / "record"))
    trainer.train()
    one, two = RunRecord.load(tmp_path / "record"), RunRecord.load(tmp_path / "record-2")
    assert one.dictionaries[0]["identity"] != two.dictionaries[0]["identity"]


def test_one_callback_twice(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    callback = FeatureAttributionCallback(make_dictionary(), tmp_path / "record")
    trainer.add_callback(callback)
    assert "twice" in refused(trainer, callback)
    assert not (tmp_path / "record").exists()


def test_a_refused_run_can_be_tried_again_in_the_same_directory(tmp_path: Path) -> None:
    refused(dpo(tmp_path), FeatureAttributionCallback(dictionary_of("model.rotary_emb"), tmp_path / "record"))
    trainer = dpo(tmp_path)
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    trainer.train()
    assert RunRecord.load(tmp_path / "record").status == "finished"


def test_trainer_whose_step_is_not_known(tmp_path: Path) -> None:
    class OwnLoopTrainer(Trainer):
        def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
            return super()._inner_training_loop(*args, **kwargs)

    trainer = OwnLoopTrainer(
        make_model(make_tokenizer()),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
        train_dataset=[{"input_ids": [4, 5], "labels": [4, 5]}],
    )
    message = refused(trainer, FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    assert "its own training loop" in message
    assert "DPOTrainer" in message


def test_no_gradient_arrives(tmp_path: Path) -> None:
    trainer: Any = dpo(tmp_path, gradient_checkpointing=False)
    hook_above_the_loss = FeatureDictionary(torch.randn(8, D_MODEL), "reference.model.layers.1", "unused")
    trainer.model.reference = make_model(make_tokenizer(), seed=9)
    message = refused(trainer, FeatureAttributionCallback(hook_above_the_loss, tmp_path / "record"))
    assert "No gradient reached" in message
    assert "Likely causes" in message


def test_an_odd_number_of_rows_where_pairs_are_expected(tmp_path: Path) -> None:
    """From a collator of the user's own; TRL sets the one rejected row against both chosen ones."""
    trainer: Any = dpo(tmp_path, per_device_train_batch_size=2)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {name: values[:-1] for name, values in collate(rows).items()}
    callback = FeatureAttributionCallback(make_dictionary(), tmp_path / "record")
    assert "saw 3 rows where pairs" in refused(trainer, callback)


def test_a_dictionary_of_another_model_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = dpo(tmp_path)
    trainer.model.config.name_or_path = "somebody/tiny-llama"
    dictionary = make_dictionary()
    dictionary.model_name = "google/gemma-3-270m"
    trainer.add_callback(FeatureAttributionCallback(dictionary, tmp_path / "record"))
    with caplog.at_level(logging.WARNING, logger="trl_sae_audit"):
        trainer.train()
    assert "was made for 'google/gemma-3-270m'" in caplog.text


def test_a_directory_s_name_says_nothing_of_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = dpo(tmp_path)
    trainer.model.config.name_or_path = str(tmp_path)
    dictionary = make_dictionary()
    dictionary.model_name = "google/gemma-3-270m"
    trainer.add_callback(FeatureAttributionCallback(dictionary, tmp_path / "record"))
    with caplog.at_level(logging.WARNING, logger="trl_sae_audit"):
        trainer.train()
    assert "was made for" not in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        {"dictionary": []},
        {"dictionary": "path"},
        {"dictionary": [make_dictionary(), make_dictionary()]},
        {"top_k": 0},
        {"probe": ["w1"]},
    ],
)
def test_contradictory_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(AuditError):
        FeatureAttributionCallback(**{"dictionary": make_dictionary(), **arguments})


def test_called_from_outside_a_trainer() -> None:
    callback = FeatureAttributionCallback(make_dictionary())
    with pytest.raises(AuditError, match="outside a Trainer"):
        callback.on_train_begin(None, None, None)


def test_steps_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    trainer: Any = dpo(tmp_path, gradient_accumulation_steps=1)
    original = trainer.compute_loss
    calls: list[int] = []

    def sometimes_infinite(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = original(*args, **kwargs)
        return loss * float("inf") if len(calls) == 2 else loss

    trainer.compute_loss = sometimes_infinite
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # skips the step, as in fp16
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    assert record.table("gradient")["finite"].tolist() == [True, False, True]
    assert record.totals().attribution.nonfinite_steps == 1
    assert record.features()["attribution"].notna().all()
    assert trainer.state.log_history[0]["sae/nonfinite_steps"] == 1


def test_killed_at_any_moment_the_record_is_readable(tmp_path: Path) -> None:
    rng = random.Random(0)
    reached = []
    for attempt in range(6):
        directory = tmp_path / str(attempt)
        child = os.fork()
        if child == 0:
            trainer = dpo(directory, max_steps=100_000, logging_steps=1)
            trainer.add_callback(
                FeatureAttributionCallback(make_dictionary(), directory / "record", flush_seconds=0.0)
            )
            trainer.train()
            os._exit(0)
        deadline = time.monotonic() + 60
        while not (directory / "record" / "manifest.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 2.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        record = RunRecord.load(directory / "record")
        reached.append(record.last_step)
        assert record.status == "running"
        if record.last_step:
            assert record.steps()["step"].max() == record.last_step == record.totals().steps
    assert max(reached) > 0
