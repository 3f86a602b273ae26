"""The README's five lines, unchanged, on the models people train and the SAEs they have of them: exact to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.known_models import FEATURES, KNOWN, KnownModel
from helpers.reference import relative_error, row_gradients
from helpers.worlds import pairs
from huggingface_hub import constants
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import AuditError, FeatureAttributionCallback, RunRecord, load_dictionary
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import hidden_states

pytestmark = pytest.mark.newest

ROWS = 8


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def make_trainer(path: Path, tokenizer: Any, directory: Path, callback: Any) -> DPOTrainer:
    args = DPOConfig(
        str(directory / "out"),
        per_device_train_batch_size=ROWS // 2,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return DPOTrainer(
        str(path), args=args, train_dataset=pairs(4), processing_class=tokenizer, callbacks=[callback]
    )


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_five_lines(known: KnownModel, hub: Path, tmp_path: Path) -> None:
    path, tokenizer = known.save(tmp_path)
    tensors = known.cache(hub)
    dictionary = load_dictionary(known.release, known.sae_id)
    callback = FeatureAttributionCallback(
        dictionary, output_dir=tmp_path / "record", watch={"sycophancy": 23}, top_k=FEATURES
    )
    trainer = make_trainer(path, tokenizer, tmp_path, callback)
    inner, kept = trainer.compute_loss, []

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        kept.append((dict(inputs), dict(kwargs), weights))
        return inner(model, inputs, *args, **kwargs)

    compute_loss.__module__ = "trl"  # so that it does not count as the user's own
    trainer.compute_loss = compute_loss
    trainer.train()
    features = RunRecord.load(tmp_path / "record").features().head(10)
    assert len(features) == 10

    inputs, kwargs, weights = kept[0]
    trainer.model.load_state_dict(weights)
    rows = row_gradients(
        trainer.model, known.layer, ROWS, lambda: inner(trainer.model, dict(inputs), **kwargs)
    )
    expected = -(rows.sum(0) @ dictionary.directions.double().T)
    steps = RunRecord.load(tmp_path / "record").steps().sort_values("feature")
    assert relative_error(steps["attribution"].to_numpy(), expected.numpy()) < 1e-5

    point = resolve_hook_point(trainer.model, dictionary.hook_names)
    assert point.path == known.layer
    hidden = hidden_states(
        point, {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    )
    wanted = known.encode(hidden, tensors)
    torch.testing.assert_close(dictionary.encode(hidden), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "known", [known for known in KNOWN if "/" not in known.release], ids=lambda known: known.name
)
def test_auto_finds_it_in_the_cache(known: KnownModel, hub: Path, tmp_path: Path) -> None:
    path, _ = known.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(AuditError, match=r"none is in the local cache.*first choice is .*load_dictionary\("):
        load_dictionary("auto", model=model)
    known.cache(hub)
    dictionary = load_dictionary("auto", model=model)
    assert dictionary.name == f"{known.release}/{known.sae_id}"
    assert "of this very model" in dictionary.choice
    callback = FeatureAttributionCallback.for_model(model, tmp_path / "record", top_k=3)
    assert callback.config.dictionaries[0].identity == dictionary.identity
    assert callback.config.top_k == 3
