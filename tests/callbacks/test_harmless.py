"""The callback changes no weight, and leaves nothing behind, however training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harmless import FailingOnce, failing_at, nothing_left
from helpers.trainers import BUILDERS, dpo
from helpers.worlds import make_sae_dictionary
from transformers import TrainerCallback

from trl_sae_audit import FeatureAttributionCallback, RunRecord, Sampling


class Looking(TrainerCallback):
    """Calls a function at the end of every step."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.look()


def everything(directory: Path, kind: str = "DPO") -> FeatureAttributionCallback:
    return FeatureAttributionCallback(
        make_sae_dictionary(),
        directory / "record",
        watch={"one": 1},
        examples=True,
        token_scores=True,
        probe=["w1 w2 w3", "w4 w5"],
        probe_steps=1,
        selection_tokens=8,
        generations=None if kind == "Reward" else Sampling(answers=2, max_new_tokens=5),
        generation_prompts=None if kind == "Reward" else ["w1 w2", "w3"],
        generation_steps=1,
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_are_bit_identical(name: str, tmp_path: Path) -> None:
    plain = BUILDERS[name](tmp_path / "plain")
    plain.train()
    audited = BUILDERS[name](tmp_path / "audited")
    callback = everything(tmp_path, name)
    seen: list[bool] = []
    audited.add_callback(callback)
    audited.add_callback(Looking(lambda: seen.append(nothing_left(audited))))
    audited.train()
    assert seen == [False, False, False]
    started = BUILDERS[name](tmp_path / "started").model.state_dict()
    moved = 0
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, audited.model.state_dict()[key]), key
        moved += not torch.equal(value, started[key])
    assert moved > 0
    assert nothing_left(audited)
    record = RunRecord.load(tmp_path / "record")
    assert record.last_step == 3
    assert record.features()["selection"].abs().sum() > 0


@pytest.mark.newest
@pytest.mark.parametrize("event", ["on_substep_end", "on_optimizer_step", "on_step_end", "on_log"])
def test_nothing_is_left_after_an_exception(event: str, tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    trainer.add_callback(everything(tmp_path))
    trainer.add_callback(FailingOnce(event))
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert nothing_left(trainer)
    assert RunRecord.load(tmp_path / "record").status == "failed"


@pytest.mark.newest
def test_nothing_is_left_after_an_exception_inside_the_loss(tmp_path: Path) -> None:
    trainer: Any = dpo(tmp_path)
    failing = failing_at(3, trainer.compute_loss)
    trainer.compute_loss = failing
    trainer.add_callback(everything(tmp_path))
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert trainer.compute_loss is failing
    del trainer.compute_loss
    assert nothing_left(trainer)


@pytest.mark.newest
def test_a_trainer_can_train_again_after_a_failure(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    failing = FailingOnce("on_step_end")
    trainer.add_callback(everything(tmp_path))
    trainer.add_callback(failing)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.callback_handler.callbacks[-1].config = everything(tmp_path / "again").config
    trainer.train()
    assert RunRecord.load(tmp_path / "again" / "record").status == "finished"
    assert nothing_left(trainer)
