"""Transcoders: loaded on request, from sae-lens and from other libraries' files, and refused where no place can be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sae_training import make_texts
from helpers.transcoders import CLASSES, READS, WRITES, make_transcoder, watched
from helpers.worlds import D_MODEL, D_SAE, make_model, make_tokenizer, pairs, save_model
from huggingface_hub import constants
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save_file
from torch import Tensor

from trl_sae_audit import AuditError, FeatureScorer, FeatureShieldCallback, Flag, load_dictionary
from trl_sae_audit.cli.main import main
from trl_sae_audit.saes import encoder, loading
from trl_sae_audit.saes.doctor import diagnose
from trl_sae_audit.saes.fine_tuning import load_start
from trl_sae_audit.saes.transcoders import TopKTranscoder

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version


def states(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("architecture", CLASSES)
def test_it_encodes_and_reconstructs_as_sae_lens_does(
    architecture: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_SLICE_BYTES", 4 * D_MODEL * 20)
    transcoder = make_transcoder(architecture)
    if dtype is not None:  # what bfloat16 can say exactly
        for parameter in transcoder.parameters():
            parameter.data = parameter.data.to(dtype).float()
    dictionary = load_dictionary(transcoder, transcoder=True, dtype=dtype)
    assert (dictionary.hook_point, dictionary.reads) == (WRITES, READS)
    assert f"a transcoder that reads '{READS}'" in repr(dictionary)
    hidden = states(50)
    activations = transcoder.encode(hidden).detach()
    assert 0 < (activations != 0).float().mean() < 1
    torch.testing.assert_close(dictionary.encode(hidden), activations, rtol=1e-5, atol=1e-5)
    expected = transcoder(hidden).detach()
    torch.testing.assert_close(dictionary.reconstruct(hidden, activations), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(
        AuditError, match=r"is a transcoder: .*transcoder=True \(on the command line --transcoder"
    ):
        load_dictionary(transcoder)


def test_topk_is_sparsifys() -> None:
    transcoder = make_transcoder("topk_transcoder")
    assert isinstance(transcoder, TopKTranscoder)
    pre = states(9) @ transcoder.W_enc + transcoder.b_enc
    values, places = pre.topk(7)
    expected = torch.zeros_like(pre).scatter(-1, places, values.relu())
    torch.testing.assert_close(transcoder.encode(states(9)), expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"hook_name_out": None},
        "does not record where it reads and where it writes; set hook_name and hook_name_out",
    ),
    ({"neuronpedia_id": "gemma-2-2b/0-clt-hp"}, "is a cross-layer transcoder"),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "centred weights"),
]


@pytest.mark.parametrize(("metadata", "sentence"), REFUSED)
def test_refused(metadata: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AuditError, match=sentence):
        load_dictionary(make_transcoder(**metadata), transcoder=True)


def test_refused_for_its_shape_its_norms_or_its_hook_point() -> None:
    transcoder = make_transcoder()
    with pytest.raises(AuditError, match=r"two places.*omit it"):
        load_dictionary(transcoder, transcoder=True, hook_point="model.layers.1")
    transcoder.cfg.normalize_activations = "layer_norm"
    with pytest.raises(AuditError, match="normalised by 'layer_norm'"):
        load_dictionary(transcoder, transcoder=True)
    narrow = make_transcoder()
    narrow.W_enc.data = narrow.W_enc.data[:-1]
    with pytest.raises(AuditError, match="reads 31 dimensions and writes 32"):
        load_dictionary(narrow, transcoder=True)


def test_what_cannot_use_one_says_why(tmp_path: Path) -> None:
    transcoder = make_transcoder()
    dictionary = load_dictionary(transcoder, transcoder=True, name="tiny")
    with pytest.raises(
        AuditError, match=r"is a transcoder: the shield .* leave the residual stream beside it"
    ):
        FeatureShieldCallback(dictionary, [Flag("tiny", 3, "flattery")])
    transcoder.save_model(tmp_path)
    with pytest.raises(AuditError, match="'jumprelu_transcoder', which is not trained further"):
        load_start(str(tmp_path), None, D_MODEL)


# Files


def saved_in(place: Path) -> Any:
    place.mkdir(parents=True)
    return place


def test_saved_by_sae_lens(tmp_path: Path) -> None:
    transcoder = make_transcoder("jumprelu_skip_transcoder")
    transcoder.save_model(tmp_path)
    dictionary = load_dictionary(tmp_path, transcoder=True)
    assert (dictionary.hook_point, dictionary.reads) == (WRITES, READS)
    assert dictionary.origin == {"dictionary": str(tmp_path), "transcoder": True}
    hidden = states(9)
    torch.testing.assert_close(
        dictionary.reconstruct(hidden, dictionary.encode(hidden)),
        transcoder(hidden).detach(),
        rtol=1e-5,
        atol=1e-4,
    )


def test_gemma_scope(tmp_path: Path) -> None:
    place = saved_in(tmp_path / "gemma-scope-2b-pt-transcoders/layer_12/width_16k/average_l0_6")
    transcoder = make_transcoder()
    np.savez(place / "params.npz", **{name: value.numpy() for name, value in transcoder.state_dict().items()})
    dictionary = load_dictionary(place, transcoder=True)
    assert dictionary.reads == "blocks.12.ln2.hook_normalized"
    assert (dictionary.hook_point, dictionary.model_name) == ("blocks.12.hook_mlp_out", "google/gemma-2-2b")
    torch.testing.assert_close(dictionary.encode(states(9)), transcoder.encode(states(9)))
    with pytest.raises(AuditError, match="is a transcoder"):
        load_dictionary(place)


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2(affine: bool, tmp_path: Path) -> None:
    place = saved_in(tmp_path / "gemma-scope-2-270m-pt/transcoder/layer_9_width_16k_l0_small")
    transcoder = make_transcoder("jumprelu_skip_transcoder" if affine else "jumprelu_transcoder")
    weights = {name.replace("W_", "w_"): value for name, value in transcoder.state_dict().items()}
    if affine:
        weights["affine_skip_connection"] = weights.pop("w_skip").T.contiguous()
    norms = {side: f"model.layers.9.{side}_feedforward_layernorm.output" for side in ("pre", "post")}
    config = {
        "hf_hook_point_in": norms["pre"],
        "hf_hook_point_out": norms["post"],
        "model_name": "gemma-v3-270m-pt",
    }
    save_file(weights, place / "params.safetensors")
    (place / "config.json").write_text(json.dumps(config))
    dictionary = load_dictionary(place, transcoder=True)
    assert (dictionary.reads, dictionary.hook_point) == (norms["pre"], norms["post"])
    hidden = states(9)
    torch.testing.assert_close(
        dictionary.reconstruct(hidden, dictionary.encode(hidden)),
        transcoder(hidden).detach(),
        rtol=1e-5,
        atol=1e-4,
    )
    save_file({**weights, "w_dec": weights["w_dec"][:, None].repeat(1, 3, 1)}, place / "params.safetensors")
    with pytest.raises(AuditError, match="a cross-layer transcoder"):
        load_dictionary(place, transcoder=True)


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify(skip: bool, tmp_path: Path) -> None:
    place = saved_in(tmp_path / "skip-transcoder-SmolLM2-135M-64x/layers.10.mlp")
    transcoder = make_transcoder("topk_transcoder")
    state = transcoder.state_dict()
    weights = {"encoder.weight": state["W_enc"].T.contiguous(), "encoder.bias": state["b_enc"]}
    weights |= {name: state[name] for name in ("W_dec", "b_dec", *(["W_skip"] if skip else []))}
    save_file(weights, place / "sae.safetensors")
    config = {"activation": "topk", "k": 7, "d_in": D_MODEL, "transcode": True, "skip_connection": skip}
    (place / "cfg.json").write_text(json.dumps(config))
    dictionary = load_dictionary(place, transcoder=True)
    assert (dictionary.reads, dictionary.hook_point) == ("layers.10.mlp.input", "layers.10.mlp.output")
    hidden = states(9)
    pre = hidden @ weights["encoder.weight"].T + weights["encoder.bias"]  # nothing is subtracted
    values, places = pre.topk(7)
    acts = torch.zeros_like(pre).scatter(-1, places, values.relu())
    expected = acts @ weights["W_dec"] + weights["b_dec"] + (hidden @ weights["W_skip"].T if skip else 0)
    torch.testing.assert_close(dictionary.encode(hidden), acts)
    torch.testing.assert_close(dictionary.reconstruct(hidden, acts), expected, rtol=1e-5, atol=1e-4)
    for other in ("normalize_io", "cross_layer"):
        (place / "cfg.json").write_text(json.dumps({**config, other: 4}))
        with pytest.raises(AuditError, match=f"was trained with {other}"):
            load_dictionary(place, transcoder=True)


def test_a_release_of_sae_lens_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3's, from a local cache of the real layout."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--mwhanna--qwen3-0.6b-transcoders-lowl0"
    snapshot = saved_in(repository / "snapshots" / ("0" * 40))
    saved_in(repository / "refs").joinpath("main").write_text("0" * 40)
    transcoder = make_transcoder("transcoder")
    state = transcoder.state_dict()
    save_file({**state, "W_enc": state["W_enc"].T.contiguous()}, snapshot / "layer_14.safetensors")
    settings = {"d_model": D_MODEL, "d_feature": D_SAE, "batch_size": 64}
    wandb = {name: {"value": value} for name, value in settings.items()}
    (snapshot / "wandb-config.yaml").write_text(json.dumps(wandb))  # JSON is YAML
    (snapshot / "config.yaml").write_text('{"model_name": "Qwen/Qwen3-0.6B"}')
    release = ("mwhanna-qwen3-0.6b-transcoders-lowl0", "layer_14")
    dictionary = load_dictionary(*release, transcoder=True)
    assert (dictionary.reads, dictionary.hook_point) == ("blocks.14.mlp.hook_in", "blocks.14.hook_mlp_out")
    assert dictionary.model_name == "Qwen/Qwen3-0.6B"
    torch.testing.assert_close(dictionary.encode(states(9)), transcoder.encode(states(9)).detach())
    with pytest.raises(AuditError, match=r"mwhanna-.* is a transcoder"):
        load_dictionary(*release)


def test_cross_layer_transcoders_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """sae-lens loads them as if they wrote in one place; no other name makes one of them."""
    monkeypatch.setattr(loading, "load_release", lambda *release: make_transcoder())
    release = ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_3")
    assert release[1] in get_pretrained_saes_directory()[release[0]].saes_map
    with pytest.raises(AuditError, match="is a cross-layer transcoder"):
        load_dictionary(*release, transcoder=True, name="mine")


# In a model


def test_the_doctor_measures_the_mlps_output() -> None:
    model, tokenizer, texts = make_model(make_tokenizer()), make_tokenizer(bos=True), make_texts(40)
    transcoder = make_transcoder("skip_transcoder")
    inputs, outputs = [], []
    with watched(model, "model.layers.1.mlp", "model.layers.1.mlp") as seen, torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
            inputs.append(seen["read"][0, 1:])
            outputs.append(seen["written"][0, 1:])
    read, written = torch.cat(inputs), torch.cat(outputs)
    # the best affine map of the MLP's input, so that the fit is neither 0 nor 1
    ones = torch.cat([read, torch.ones(len(read), 1)], 1)
    affine = torch.linalg.lstsq(ones, written).solution
    transcoder.W_skip.data, transcoder.b_dec.data = affine[:-1].T.contiguous(), affine[-1]
    transcoder.W_dec.data *= 1e-3
    dictionary = load_dictionary(transcoder, transcoder=True)
    found = diagnose(model, tokenizer, texts, dictionary)
    lost = (written - transcoder(read).detach()).square().sum()
    fvu = float(lost / (written - written.mean(0)).square().sum())
    assert found.health is not None
    assert 0.05 < fvu < 0.95
    assert found.health.fvu == pytest.approx(fvu, rel=1e-3)
    checks = {check.name: check for check in found.checks}
    assert checks["hook point"].found == "model.layers.1.mlp"
    assert checks["reads"].found == "model.layers.1.mlp (input)"
    assert "about what this MLP adds" in checks["reads"].remark


def test_the_scorer_reads_the_mlps_input() -> None:
    model, tokenizer, transcoder = make_model(make_tokenizer()), make_tokenizer(), make_transcoder()
    dictionary = load_dictionary(transcoder, transcoder=True)
    features = list(range(D_SAE))
    found = FeatureScorer(model, tokenizer, dictionary, pooling="mean").score(
        ["w1 w2 "] * 2, ["w7 w8", "w9 w10 w11"], features
    )
    for row, words in enumerate(("w1 w2 w7 w8", "w1 w2 w9 w10 w11")):
        with watched(model, "model.layers.1.mlp", "model.layers.1.mlp") as seen, torch.no_grad():
            model(torch.tensor([tokenizer(words)["input_ids"]]))
        expected = transcoder.encode(seen["read"][0, 2:]).mean(0).detach()
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    save_model(make_model(tokenizer), tokenizer, tmp_path / "model")
    make_transcoder().save_model(tmp_path / "sae")
    pairs(8).to_json(tmp_path / "pairs.jsonl")
    command = ["audit", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "pairs.jsonl")]
    command += [
        "--dictionary",
        str(tmp_path / "sae"),
        "--output_dir",
        str(tmp_path / "audit"),
        "--device",
        "cpu",
    ]
    assert main(command) == 2
    assert "--transcoder" in capsys.readouterr().err
    assert main([*command, "--transcoder", "--no_lookahead"]) == 0
    assert "a transcoder: reads blocks.1.mlp.hook_in" in " ".join(capsys.readouterr().out.split())
    assert main(["report", str(tmp_path / "audit")]) == 0
    assert "a transcoder: reads blocks.1.mlp.hook_in" in (tmp_path / "audit" / "report.html").read_text()
