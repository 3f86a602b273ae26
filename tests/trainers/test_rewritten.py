"""Trainers whose source a library rewrote into classes of its own: known by name without prefix and by their configuration."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.dpo_trainer as source
from helpers.reference import recorded, relative_error, row_gradients
from helpers.trainers import BUILDERS
from helpers.worlds import D_SAE, HOOK_POINT, make_dictionary, make_model, make_tokenizer, pairs
from transformers import Trainer, TrainingArguments
from trl import DPOConfig

from trl_sae_audit import AuditError, FeatureAttributionCallback, RunRecord
from trl_sae_audit.trainers.kinds import trainer_kind

pytestmark = pytest.mark.newest

ROWS = 8


@pytest.fixture
def rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Trainer]:
    """TRL's DPO trainer as Unsloth has it: its source under another name, in a module of its own, derived from `Trainer` alone."""
    text = inspect.getsource(source).replace("class DPOTrainer(", "class _UnslothDPOTrainer(")
    text = text.replace("super(DPOTrainer", "super(_UnslothDPOTrainer")
    for dots, package in (("...", "trl."), ("..", "trl."), (".", "trl.trainer.")):
        text = re.sub(rf"from {re.escape(dots)}(\w)", rf"from {package}\1", text)
    text = text.replace("from .. import", "from trl import")
    text += "\nclass UnslothDPOTrainer(_UnslothDPOTrainer):\n    pass\n"
    path = tmp_path / "UnslothDPOTrainer.py"
    path.write_text(text)
    module = types.ModuleType("unsloth_compiled_cache.UnslothDPOTrainer")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, str(path), "exec"), vars(module))
    return module.UnslothDPOTrainer


def settings(directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": ROWS // 2,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def test_a_rewritten_class_has_sides_and_pairs(rewritten: type[Trainer], tmp_path: Path) -> None:
    tokenizer, dictionary = make_tokenizer(), make_dictionary()
    callback = FeatureAttributionCallback(dictionary, tmp_path / "record", top_k=D_SAE)
    trainer = rewritten(
        make_model(tokenizer),
        make_model(tokenizer),
        args=DPOConfig(**settings(tmp_path)),
        train_dataset=pairs(4),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    assert trainer_kind(trainer) == "DPOTrainer"
    inner, kept = trainer.compute_loss, []

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        kept.append((dict(inputs), dict(kwargs), weights))
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    assert record.manifest["sides"] == ["chosen", "rejected"]
    assert record.table("gradient")["examples"].tolist() == [4]
    inputs, kwargs, weights = kept[0]
    trainer.model.load_state_dict(weights)
    rows = row_gradients(
        trainer.model, HOOK_POINT, ROWS, lambda: inner(trainer.model, dict(inputs), **kwargs)
    )
    directions, steps = dictionary.directions.double(), record.steps()
    chosen = -(rows[: ROWS // 2].sum(0) @ directions.T)
    pairwise = -(rows[: ROWS // 2] + rows[ROWS // 2 :]) @ directions.T
    error = (pairwise.var(0, unbiased=True) * len(pairwise)).sqrt()
    assert relative_error(recorded(steps, 1, "positive"), chosen.numpy()) < 1e-5
    assert relative_error(recorded(steps, 1, "standard_error"), error.numpy()) < 1e-5


def test_the_name_alone_is_not_enough(tmp_path: Path) -> None:
    class UnslothDPOTrainer(Trainer):
        pass

    tokenizer = make_tokenizer()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = UnslothDPOTrainer(make_model(tokenizer), arguments, train_dataset=[])
    assert trainer_kind(trainer) == "Trainer"


def test_a_row_of_several_answers_is_refused_for_that_reason(tmp_path: Path) -> None:
    class AsyncGRPOTrainer(Trainer):
        pass

    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = AsyncGRPOTrainer(make_model(make_tokenizer()), arguments, train_dataset=[])
    with pytest.raises(AuditError, match=r"packs several answers into one row.*train with GRPOTrainer"):
        trainer_kind(trainer)


def test_segments_in_a_row_are_refused_for_that_reason(tmp_path: Path) -> None:
    trainer = BUILDERS["GRPO"](tmp_path)
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: prepare(inputs) | {"segment_id": torch.zeros(4, 9)}
    with pytest.raises(AuditError, match=r"holds several answers \(segment_id\)"):
        trainer.train()


def test_a_trainer_without_sides_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Own(Trainer):
        pass

    tokenizer = make_tokenizer()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, 60, (8, 9)).tolist()]
    arguments = {name: value for name, value in settings(tmp_path).items() if name != "max_steps"}
    trainer = Own(
        make_model(tokenizer),
        TrainingArguments(**arguments, max_steps=3, logging_steps=1),
        train_dataset=rows,
        callbacks=[FeatureAttributionCallback(make_dictionary(), tmp_path / "record")],
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [record.message for record in caplog.records if "read without sides" in record.message]
    assert len(said) == 1
    assert said[0].startswith("Own is read without sides")
