"""The callback changes no weight, and leaves nothing behind, however training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import BUILDERS, dpo
from transformers import Trainer, TrainerCallback
from worlds import make_dictionary

from trl_sae_audit import FeatureAttributionCallback, RunRecord

pytestmark = pytest.mark.newest

WRAPPED = {
    "log",
    "training_step",
    "compute_loss",
    "_run_epoch",
    "_save_checkpoint",
    "_calculate_rewards_from_functions",
}


class FailingOnce(TrainerCallback):
    """Raises at an event of the second optimizer step."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._fail)

    def _fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 1:
            raise RuntimeError("planted")


class Looking(TrainerCallback):
    """Calls a function at the end of every step."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.look()


def everything(directory: Path) -> FeatureAttributionCallback:
    return FeatureAttributionCallback(
        make_dictionary(),
        directory / "record",
        watch={"one": 1},
        examples=True,
        token_scores=True,
        probe=["w1 w2 w3", "w4 w5"],
        probe_steps=1,
    )


def nothing_left(trainer: Trainer) -> bool:
    """No hook of this package on the model (transformers leaves some of its own), no wrapped method."""
    hooks = [hook for module in trainer.model.modules() for hook in module._forward_hooks.values()]
    ours = [hook for hook in hooks if hook.__module__.startswith("trl_sae_audit")]
    handler = vars(trainer.callback_handler)
    return not ours and not WRAPPED & vars(trainer).keys() and "on_train_end" not in handler


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_are_bit_identical(name: str, tmp_path: Path) -> None:
    plain = BUILDERS[name](tmp_path / "plain")
    plain.train()
    audited = BUILDERS[name](tmp_path / "audited")
    callback = everything(tmp_path)
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
    assert RunRecord.load(tmp_path / "record").last_step == 3


@pytest.mark.parametrize("event", ["on_substep_end", "on_optimizer_step", "on_step_end", "on_log"])
def test_nothing_is_left_after_an_exception(event: str, tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    trainer.add_callback(everything(tmp_path))
    trainer.add_callback(FailingOnce(event))
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert nothing_left(trainer)
    assert RunRecord.load(tmp_path / "record").status == "failed"


def test_nothing_is_left_after_an_exception_inside_the_loss(tmp_path: Path) -> None:
    trainer: Any = dpo(tmp_path)
    original = trainer.compute_loss
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("planted")
        return original(*args, **kwargs)

    trainer.compute_loss = failing
    trainer.add_callback(everything(tmp_path))
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert trainer.compute_loss is failing
    del trainer.compute_loss
    assert nothing_left(trainer)


def test_a_trainer_can_train_again_after_a_failure(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    failing = FailingOnce("on_step_end")
    trainer.add_callback(everything(tmp_path))
    trainer.add_callback(failing)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.callback_handler.callbacks[-1].settings = everything(tmp_path / "again").settings
    trainer.train()
    assert RunRecord.load(tmp_path / "again" / "record").status == "finished"
    assert nothing_left(trainer)
