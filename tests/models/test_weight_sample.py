"""A model is recognised by a few of its weights after it was saved and loaded, and no other is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.worlds import make_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sae_audit.models.weight_sample import PARAMETERS, VALUES, differing_parameter, sample_weights


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(tokenizer)


def change_all(model: torch.nn.Module, by: float = 1e-4) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def test_what_is_sampled(model: LlamaForCausalLM) -> None:
    sample = sample_weights(model)
    names = list(dict.fromkeys(sample["parameter"]))
    assert len(names) == PARAMETERS
    assert len(sample["value"]) <= PARAMETERS * VALUES
    assert {name.split(".")[2] for name in names if name.startswith("model.layers")} >= {"0", "1"}
    for name, place, value in zip(sample["parameter"], sample["place"], sample["value"], strict=True):
        assert model.get_parameter(name).flatten()[place] == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_recognised_in_whatever_type_it_was_saved(
    model: LlamaForCausalLM, dtype: torch.dtype, tmp_path: Path
) -> None:
    sample = sample_weights(model)
    model.to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert differing_parameter(loaded, sample) is None
    change_all(loaded, 0.01)
    assert differing_parameter(loaded, sample) == sample["parameter"][0]


def test_another_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    sample = sample_weights(model)
    assert differing_parameter(make_model(tokenizer, seed=1), sample) is not None
    change_all(model)
    assert differing_parameter(model, sample) is not None


def test_of_an_adapter_what_was_trained(model: LlamaForCausalLM, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    )
    change_all(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    sample = sample_weights(adapted)
    assert all("lora" in name for name in sample["parameter"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert differing_parameter(loaded, sample) is None
    change_all(loaded)
    assert "lora" in str(differing_parameter(loaded, sample))
    assert differing_parameter(adapted.merge_and_unload(), sample) is None, "nothing of it can be compared"


def test_a_parameter_of_another_shape(model: LlamaForCausalLM) -> None:
    sample = {"parameter": ["model.norm.weight"], "place": [10**6], "value": [1.0]}
    assert differing_parameter(model, sample) == "model.norm.weight"
