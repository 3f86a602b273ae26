"""What wrapped methods leave in tracebacks: exceptions of others show none of this package's frames, its own show all."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from helpers.trainers import dpo
from helpers.worlds import make_dictionary

import trl_sae_audit
from trl_sae_audit import AuditError, FeatureAttributionCallback, FeatureShieldCallback, Flag

pytestmark = pytest.mark.newest
PACKAGE = str(Path(trl_sae_audit.__file__).parent)


def own_frames(error: BaseException) -> list[str]:
    return [
        f"{entry.filename}:{entry.lineno} {entry.name}"
        for entry in traceback.extract_tb(error.__traceback__)
        if entry.filename.startswith(PACKAGE)
    ]


def fail(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("somebody else's")


@pytest.mark.parametrize(
    "method", ["compute_loss", "training_step", "log", "_save_checkpoint", "get_batch_samples"]
)
def test_an_exception_that_passes_through_shows_no_frame_of_ours(method: str, tmp_path: Path) -> None:
    trainer = dpo(tmp_path, save_strategy="steps", save_steps=1)
    shielded = FeatureShieldCallback(make_dictionary(), [Flag("tiny", 3, label="x")])
    for callback in (FeatureAttributionCallback(make_dictionary(), tmp_path / "record"), shielded):
        trainer.add_callback(callback)
    setattr(trainer, method, fail)
    with pytest.raises(ValueError, match="somebody else's") as caught:
        trainer.train()
    assert caught.traceback[-1].name == "fail"
    assert own_frames(caught.value) == []


def test_a_refusal_during_training_keeps_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = dpo(tmp_path)
    callback = FeatureAttributionCallback(make_dictionary(), tmp_path / "record")
    trainer.add_callback(callback)

    def refuse(*args: Any) -> None:
        raise AuditError("This is wrong; do that.")

    monkeypatch.setattr("trl_sae_audit.callbacks.session.AttributionSession.begin_microbatch", refuse)
    with pytest.raises(AuditError) as caught:
        trainer.train()
    assert any("_training_step" in frame for frame in own_frames(caught.value))
