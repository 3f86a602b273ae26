"""How many tokens are encoded is decided once, from sizes alone, and recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.trainers import dpo
from helpers.worlds import HOOK_POINT, make_sae_dictionary

from trl_sae_audit import FeatureAttributionCallback, FeatureDictionary, RunRecord
from trl_sae_audit.callbacks.config import AttributionConfig
from trl_sae_audit.callbacks.token_budget import FEWEST, MOST, with_token_budget


def test_it_falls_as_the_dictionary_grows(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)

    def budget(features: int, **options: object) -> int | None:
        dictionary = FeatureDictionary(torch.ones(features, 16), HOOK_POINT, "wide")
        return with_token_budget(AttributionConfig(dictionary, **options), trainer).selection_tokens

    sizes = [budget(features) for features in (8, 2**12, 2**14, 2**17)]
    assert sizes[0] == MOST
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == FEWEST
    assert budget(2**12, token_scores=True) < budget(2**12)
    assert budget(2**17, selection_tokens=10**6) == 10**6


def test_it_counts_parameters_whole_that_zero3_keeps_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed leaves an empty tensor in a parameter's place between two uses, and its size beside it."""
    trainer = dpo(tmp_path)
    config = AttributionConfig(FeatureDictionary(torch.ones(2**12, 16), HOOK_POINT, "wide"))
    whole = with_token_budget(config, trainer).selection_tokens
    for parameter in trainer.model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    monkeypatch.setattr("transformers.trainer_pt_utils.is_deepspeed_zero3_enabled", lambda: True)
    assert whole is not None
    assert whole > FEWEST
    assert with_token_budget(config, trainer).selection_tokens == whole


def test_the_record_names_it(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=1)
    trainer.add_callback(FeatureAttributionCallback(make_sae_dictionary(), tmp_path / "record"))
    trainer.train()
    config = RunRecord.load(tmp_path / "record").manifest["config"]
    assert FEWEST <= config["selection_tokens"] <= MOST
