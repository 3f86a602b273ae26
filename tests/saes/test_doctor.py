"""The doctor's findings on dictionaries that fit, and on each kind that does not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import trl
from helpers.sae_training import WIDTH, make_narrow_model, make_texts, training_config
from helpers.worlds import make_tokenizer
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import LlamaForCausalLM

from trl_sae_audit import FeatureDictionary, load_dictionary
from trl_sae_audit.cli.doctor import show
from trl_sae_audit.cli.options import OutputArguments
from trl_sae_audit.saes.doctor import Check, Diagnosis, diagnose, trainer_support
from trl_sae_audit.saes.training import train_dictionary

TEXTS = make_texts(40)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    model = make_narrow_model()
    model.config.name_or_path = "someone/tiny"
    return model


@pytest.fixture(scope="module")
def sae(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = training_config(tmp_path_factory.mktemp("doctor") / "sae")
    return train_dictionary(model, make_tokenizer(bos=True), make_texts(), config).path


def examine(model: LlamaForCausalLM, dictionary: FeatureDictionary, texts: list[str] = TEXTS) -> Diagnosis:
    return diagnose(model, make_tokenizer(bos=True), texts, dictionary)


def check(diagnosis: Diagnosis, name: str) -> Check:
    (found,) = [check for check in diagnosis.checks if check.name == name]
    return found


def blank(width: int = WIDTH, **metadata: str) -> FeatureDictionary:
    """A random SAE, of no use to any model."""
    torch.manual_seed(0)
    config = TopKSAEConfig(d_in=width, d_sae=64, k=6, metadata=SAEMetadata(**metadata))
    return load_dictionary(TopKSAE(config), hook_point="model.layers.1", name="blank")


def test_a_dictionary_that_fits(model: LlamaForCausalLM, sae: Path) -> None:
    diagnosis = examine(model, load_dictionary(sae))
    assert diagnosis.fits
    assert {check.name: check.state for check in diagnosis.checks} == dict.fromkeys(
        ("hook point", "width", "made for", "tokens", "FVU", "token FVU", "L0", "dead"), "good"
    )
    assert diagnosis.health is not None
    assert diagnosis.health.fvu < 0.4
    assert diagnosis.verdict.startswith("The dictionary fits this model")


def test_one_that_explains_nothing(model: LlamaForCausalLM) -> None:
    diagnosis = examine(model, blank(model_name="someone/tiny"))
    assert not diagnosis.fits
    assert check(diagnosis, "FVU").state == "bad"
    assert "does not fit this model: FVU" in diagnosis.verdict


def test_another_model_of_the_same_shape(model: LlamaForCausalLM, sae: Path) -> None:
    torch.manual_seed(7)
    stranger = make_narrow_model()
    for parameter in stranger.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    stranger.config.name_or_path = "else/where"
    diagnosis = examine(stranger, load_dictionary(sae))
    assert check(diagnosis, "made for").state == "doubtful"
    assert "you give else/where" in check(diagnosis, "made for").remark
    assert not diagnosis.fits


def test_wrong_width(model: LlamaForCausalLM) -> None:
    diagnosis = examine(model, blank(width=WIDTH + 4))
    assert not diagnosis.fits
    assert diagnosis.health is None
    assert f"residual stream has {WIDTH}" in check(diagnosis, "width").remark
    assert "made for another model" in diagnosis.verdict


def test_missing_hook_point(model: LlamaForCausalLM, sae: Path) -> None:
    diagnosis = examine(model, load_dictionary(sae, hook_point="blocks.9.hook_resid_post"))
    assert not diagnosis.fits
    assert "has 3 layers" in check(diagnosis, "hook point").remark


def test_one_layer_off(model: LlamaForCausalLM, sae: Path) -> None:
    diagnosis = examine(model, load_dictionary(sae, hook_point="model.layers.2"))
    assert check(diagnosis, "next layer").found == "model.layers.1"
    assert "pass --hook_point model.layers.1" in check(diagnosis, "next layer").remark


def test_raw_directions_are_doubtful(model: LlamaForCausalLM) -> None:
    raw = FeatureDictionary(torch.eye(WIDTH), hook_point="model.layers.1", name="raw")
    diagnosis = examine(model, raw)
    assert diagnosis.fits
    assert check(diagnosis, "fit").state == "doubtful"
    assert "doubts about: made for, fit" in diagnosis.verdict


def test_texts_without_tokens(model: LlamaForCausalLM, sae: Path) -> None:
    diagnosis = examine(model, load_dictionary(sae), texts=["<eos>"])
    assert not diagnosis.fits
    assert check(diagnosis, "tokens").state == "bad"


def test_max_tokens(model: LlamaForCausalLM, sae: Path) -> None:
    diagnosis = diagnose(
        model, make_tokenizer(bos=True), TEXTS, load_dictionary(sae), batch_size=2, max_tokens=50
    )
    assert diagnosis.health is not None
    assert 50 <= diagnosis.health.tokens < 120


def test_is_json_without_nan(model: LlamaForCausalLM) -> None:
    raw = FeatureDictionary(torch.eye(WIDTH), hook_point="model.layers.1", name="raw")
    content = json.loads(json.dumps(examine(model, raw).to_dict(), allow_nan=False))
    assert content["health"]["fvu"] is None
    assert content["fits"] is True


def test_trainers_of_the_installed_trl() -> None:
    support = {trainer.name: trainer for trainer in trainer_support()}
    always = ("DPO", "KTO", "GRPO", "RLOO", "Reward", "SFT", "OnlineDPO")
    assert all(support[f"{name}Trainer"].works for name in always)
    has_ppo = tuple(map(int, trl.__version__.split(".")[:2])) < (1, 13)
    assert support["PPOTrainer"].works is has_ppo
    assert has_ppo or "trl-sae-audit[ppo]" in support["PPOTrainer"].remark


def test_a_trainer_whose_dependency_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def without(name: str) -> object:
        if name == "trl.experimental.online_dpo":
            raise ModuleNotFoundError("No module named 'judge'", name="judge")
        return load(name)

    monkeypatch.setattr(importlib, "import_module", without)
    online = next(trainer for trainer in trainer_support() if trainer.name == "OnlineDPOTrainer")
    assert (online.works, online.remark) == (False, "needs judge, which is not installed")


def test_table_shows_everything(model: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    show(examine(model, blank(model_name="a[red]b")), OutputArguments())
    printed = capsys.readouterr().out
    for part in ("hook point", "model.layers.1", "FVU", "bad", "PPOTrainer", "does not fit", "a[red]b"):
        assert part in printed
