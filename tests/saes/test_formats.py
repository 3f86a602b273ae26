"""Every format that SAEs are published in: loads exactly, or is refused by name with what to do. Nothing is unpickled.

The files have the real layout; what an SAE of the format does is written out here by its own library's definition.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sae_formats import CASES, FEATURES, LEARNED, R1, SPARSIFY, WIDTH, trainer, write
from helpers.saes import hidden_states
from safetensors.torch import save_file

from trl_sae_audit import AuditError, load_dictionary


@pytest.fixture(autouse=True)
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test loads here, no pickle is run."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("name", CASES)
def test_loads_exactly(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    place, weights = write(case, tmp_path)
    hidden = hidden_states(40)
    dictionary = load_dictionary(place)
    expected = case.acts(hidden, weights)
    assert 0 < float((expected != 0).float().mean()) < 1
    torch.testing.assert_close(dictionary.encode(hidden), expected)
    torch.testing.assert_close(dictionary.reconstruct(hidden, expected), case.decode(expected, weights))
    written = case.decode(torch.eye(FEATURES), weights) - case.decode(torch.zeros(1, FEATURES), weights)
    torch.testing.assert_close(dictionary.directions, torch.nn.functional.normalize(written, dim=1))
    assert dictionary.hook_point == case.hook
    if case.model is not None:
        assert dictionary.model_name == case.model


@pytest.mark.parametrize("name", CASES)
def test_torchs_default_type_changes_nothing(name: str, tmp_path: Path) -> None:
    place, _ = write(CASES[name], tmp_path)
    expected = load_dictionary(place)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = load_dictionary(place)
    finally:
        torch.set_default_dtype(torch.float32)
    hidden = hidden_states(40)
    assert torch.equal(found.encode(hidden), expected.encode(hidden))
    assert torch.equal(found.directions, expected.directions)
    given, kept = (each.encoder.sae.state_dict() for each in (expected, found))
    for name, value in given.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("place", "beside"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", None),
        ("SAE-Res-Qwen3.5-2B-Base-W32K-L0_4/layer12.sae.pt", None),
        (f"{LEARNED}/ae.pt", "config.json"),
        ("sae/sae_weights.pt", "cfg.json"),
    ],
)
def test_pickles_are_refused_with_the_command_that_converts_them(
    place: str, beside: str | None, tmp_path: Path
) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"\x80\x04 a pickle")
    if beside is not None:
        (file.parent / beside).write_text("{}")
    for given in {file, file.parent if beside else file}:
        with pytest.raises(
            AuditError, match=rf"published as a pickle \({re.escape(file.name)}\).*convert it once with"
        ):
            load_dictionary(given)


def test_the_command_of_the_refusal_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["dictionary_learning BatchTopKSAE"]
    place, weights = write(case, tmp_path)
    (place / "ae.safetensors").unlink()
    torch.save(weights, place / "ae.pt")
    with pytest.raises(AuditError) as refusal:
        load_dictionary(place)
    command = shlex.split(re.search(r"`(python .*?)`", str(refusal.value))[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    hidden = hidden_states(20)
    torch.testing.assert_close(load_dictionary(place).encode(hidden), case.acts(hidden, weights))


REFUSED = {
    "sparsify": [
        ({"cfg.json": {**SPARSIFY, "transcode": True}}, "is a transcoder"),
        ({"cfg.json": {**SPARSIFY, "skip_connection": True}}, "an MLP or attention"),
        ({"cfg.json": {**SPARSIFY, "activation": "groupmax"}}, "'groupmax', and only topk is read"),
        ({"cfg.json": {**SPARSIFY, "signed": True}}, "signed topk"),
        ({"cfg.json": {"d_in": WIDTH}}, "damaged or incomplete: it has no 'k'"),
    ],
    "dictionary_learning BatchTopKSAE": [
        (trainer("BatchTopKSAE", submodule_name="mlp_out_layer_14"), "a dictionary of mlp_out_layer_14"),
        (trainer("CrossCoder"), "a CrossCoder of dictionary_learning, which is not known here"),
        ({"config.json": {"trainer": {}}}, "damaged or incomplete: it has no 'dict_class'"),
        ({"config.json": [1]}, "is not a configuration"),
    ],
    "llama scope": [
        (
            {
                "hyperparams.json": {
                    **CASES["llama scope"].configs["hyperparams.json"],
                    "hook_point_out": "blocks.15.hook_mlp_out",
                }
            },
            "a transcoder",
        ),
        (
            {
                "hyperparams.json": {
                    **CASES["llama scope"].configs["hyperparams.json"],
                    "dataset_average_activation_norm": {"in": 0.0},
                }
            },
            "a mean norm of 0.0; copy it again",
        ),
    ],
    "llama scope r1 distill": [
        (
            {"config.json": {**R1, "dataset_average_activation_norm": None}},
            "a mean norm that its files do not record",
        ),
    ],
    "gemma scope 2": [
        (
            {
                "config.json": {
                    **CASES["gemma scope 2"].configs["config.json"],
                    "hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output",
                }
            },
            "is a transcoder",
        ),
    ],
    "sae-lens before 6, fine-tuned scale": [
        (
            {
                "cfg.json": {
                    "d_in": WIDTH,
                    "d_sae": FEATURES,
                    "hook_name": "blocks.8.hook_resid_pre",
                    "dtype": "float32",
                }
            },
            "a factor for each feature's output, and its configuration says that there is none",
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "configs", "match"), [(name, *one) for name, several in REFUSED.items() for one in several]
)
def test_what_cannot_be_read_is_refused_by_name(
    name: str, configs: dict[str, Any], match: str, tmp_path: Path
) -> None:
    place, _ = write(CASES[name], tmp_path)
    for file, content in configs.items():
        (place / file).write_text(json.dumps(content))
    with pytest.raises(AuditError, match=match):
        load_dictionary(place)


def test_a_threshold_that_training_never_set(tmp_path: Path) -> None:
    place, weights = write(CASES["dictionary_learning BatchTopKSAE"], tmp_path)
    save_file({**weights, "threshold": torch.tensor(-1.0)}, place / "ae.safetensors")
    with pytest.raises(AuditError, match="never got its threshold"):
        load_dictionary(place)


def test_a_folder_whose_name_was_changed(tmp_path: Path) -> None:
    case = CASES["qwen scope"]
    file = tmp_path / "mine" / "layer12.sae.safetensors"
    file.parent.mkdir()
    save_file(case.tensors(), file)
    with pytest.raises(AuditError, match=r"how many features are active.*keep that name"):
        load_dictionary(file)


def test_converter_by_name(tmp_path: Path) -> None:
    place, _ = write(CASES["sparsify"], tmp_path)
    assert load_dictionary(place, converter="sparsify").d_sae == FEATURES
    with pytest.raises(AuditError, match="converter is 'sparsfy'; choose one of gemma_scope"):
        load_dictionary(place, converter="sparsfy")
    with pytest.raises(AuditError, match="as an SAE of goodfire has"):
        load_dictionary(place, converter="goodfire")


def test_an_npz_with_objects_in_it(tmp_path: Path) -> None:
    place = tmp_path / "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", threshold=np.array([{}], dtype=object))
    with pytest.raises(AuditError, match=r"damaged or incomplete.*allow_pickle"):
        load_dictionary(place)


def test_arrays_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    place, weights = write(CASES["sparsify"], tmp_path)
    (path,) = place.rglob("*.safetensors")
    save_file(weights | {"encoder.bias": weights["encoder.bias"][:-1].clone()}, path)
    with pytest.raises(AuditError, match="do not fit together"):
        load_dictionary(place)
