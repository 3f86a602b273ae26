"""The words of a run: its record's contexts against every activation of every response."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.trainers import dpo, grpo
from helpers.worlds import make_sae_dictionary

from trl_sae_audit import FeatureAttributionCallback, RunRecord
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.callbacks.dashboards import as_markdown, top_features
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import hidden_states

pytestmark = pytest.mark.newest


def strongest_activations(trainer, dictionary) -> torch.Tensor:
    """Of every feature over all answers of the train set, which the trainer has tokenized, [d_sae]."""
    loss = PreferenceLoss(trainer.processing_class, trainer.args)
    point = resolve_hook_point(trainer.model, dictionary.hook_point)
    best = torch.zeros(dictionary.d_sae)
    for row in trainer.train_dataset:
        batch = loss.trainer.data_collator([row])
        with torch.no_grad():
            hidden = hidden_states(point, {name: batch[name] for name in ("input_ids", "attention_mask")})
        answers = dictionary.encode(hidden[batch["completion_mask"].bool()])
        best = torch.maximum(best, answers.max(0).values)
    return best


def test_contexts_of_a_run_are_those_of_its_responses(tmp_path: Path) -> None:
    """Without a learning rate nothing changes, so that each answer can be read again."""
    dictionary = make_sae_dictionary()
    trainer = dpo(tmp_path, max_steps=6, logging_steps=1, learning_rate=0.0)
    trainer.add_callback(FeatureAttributionCallback(dictionary, tmp_path / "record"))
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    table = record.features()
    contexts = record.contexts(table["feature"])
    seen = contexts.groupby("feature")["activation"].max()
    best = strongest_activations(trainer, dictionary)
    assert len(seen) > 20
    for feature, activation in seen.items():
        assert activation <= float(best[feature]) * 1.001
    assert set(contexts["source"]) == {"chosen", "rejected"}
    assert (contexts.groupby("feature").size() <= 8).all()
    text = [
        " ".join(trainer.processing_class.decode(row["chosen_ids"]).split()) for row in trainer.train_dataset
    ]
    text += [
        " ".join(trainer.processing_class.decode(row["rejected_ids"]).split())
        for row in trainer.train_dataset
    ]
    for row in contexts.head(50).to_dict("records"):
        shown = " ".join((row["before"] + row["at"] + row["after"]).split())
        assert any(shown in answer for answer in text)
    for row in table.to_dict("records"):
        assert bool(row["words"]) == (row["feature"] in seen.index)
    shown = top_features(record, dictionary.name)
    assert "words" in shown
    assert shown["words"].iloc[0] in as_markdown(shown)


def test_all_responses_seen_the_strongest_is_the_strongest_of_all(tmp_path: Path) -> None:
    dictionary = make_sae_dictionary()
    trainer = dpo(tmp_path, num_train_epochs=1, max_steps=-1, learning_rate=0.0)
    trainer.add_callback(FeatureAttributionCallback(dictionary, tmp_path / "record"))
    trainer.train()
    contexts = RunRecord.load(tmp_path / "record").contexts(range(dictionary.d_sae))
    found = contexts.groupby("feature")["activation"].max()
    best = strongest_activations(trainer, dictionary)
    expected = {feature: float(value) for feature, value in enumerate(best) if value > 0}
    assert found.to_dict() == pytest.approx(expected, rel=1e-3)


def test_a_resumed_run_has_the_contexts_of_one_that_never_stopped(tmp_path: Path) -> None:
    def run(where: Path, steps: int, resume: bool = False) -> None:
        saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
        trainer = dpo(where, max_steps=steps, logging_steps=1, **saving)
        trainer.add_callback(FeatureAttributionCallback(make_sae_dictionary(), where / "record"))
        trainer.train(resume_from_checkpoint=resume)

    run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    run(tmp_path / "parts", 6, resume=True)
    records = [RunRecord.load(tmp_path / name / "record") for name in ("whole", "parts")]
    one, other = (record.contexts(range(96)).drop(columns="step") for record in records)
    assert one.equals(other)
    assert records[0].features()["words"].equals(records[1].features()["words"])


def test_contexts_of_rollouts(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, max_steps=2)
    trainer.add_callback(FeatureAttributionCallback(make_sae_dictionary(), tmp_path / "record"))
    trainer.train()
    contexts = RunRecord.load(tmp_path / "record").contexts(range(96))
    assert len(contexts)
    assert set(contexts["source"]) == {"response"}
    assert not contexts["prompt"].str.startswith("<pad>").any()
