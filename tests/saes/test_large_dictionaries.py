"""A dictionary computed with in blocks, in fewer bits, from a mapped file or from elsewhere gives the same scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.saes import ACTIVE, CONFIGS, FEATURES, WIDTH, hidden_states, make_sae
from safetensors.torch import load_file, save_file

from trl_sae_audit import AuditError, FeatureDictionary, load_dictionary
from trl_sae_audit.attribution.feature_tracker import FeatureTracker
from trl_sae_audit.attribution.microbatch import RowGradients
from trl_sae_audit.attribution.observers import TokenScoreObserver
from trl_sae_audit.attribution.packed_steps import pack, unpack
from trl_sae_audit.attribution.scores import TokenScores
from trl_sae_audit.audit.gradients import active_features
from trl_sae_audit.models.hook_points import HookPoint
from trl_sae_audit.saes import dictionary as dictionary_module
from trl_sae_audit.saes import encoder as encoder_module

SLICED = [name for name in CONFIGS if name != "matching_pursuit"]
VARIANTS = [(name, {}, torch.bfloat16) for name in SLICED]
VARIANTS += [("topk", {"rescale_acts_by_decoder_norm": True}, torch.float32)]
VARIANTS += [("jumprelu", {"normalize_activations": "layer_norm"}, torch.float32)]
VARIANTS += [("gated", {"normalize_activations": "constant_norm_rescale"}, torch.float32)]


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 5 of 24 features, slices of 10, tokens 3 at a time."""
    monkeypatch.setattr(dictionary_module, "_BLOCK_BYTES", 4 * WIDTH * 5)
    monkeypatch.setattr(dictionary_module, "_TOKEN_BYTES", 4 * FEATURES * 3)
    monkeypatch.setattr(encoder_module, "_SLICE_BYTES", 4 * WIDTH * 10)


def raw(scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(FEATURES, WIDTH, generator=generator) * torch.logspace(-3, 3, FEATURES)[:, None]
    rows[7] = 0.0
    return rows * scale


def steps() -> list[RowGradients]:
    """Two optimizer steps of 6 pairs, as a trainer would give them."""
    generator = torch.Generator().manual_seed(3)
    sides = torch.tensor([1.0] * 6 + [-1.0] * 6)
    return [
        RowGradients.of(torch.randn(12, WIDTH, generator=generator), sides, paired=True) for _ in range(2)
    ]


def everything(dictionary: FeatureDictionary) -> dict[str, torch.Tensor]:
    """All that is computed with a dictionary in training and in an audit."""
    hidden, gradient = hidden_states(11), hidden_states(11).flip(0)
    answer = torch.tensor([False] * 4 + [True] * 7)
    scores = unpack(pack(steps(), dictionary, token_scores=False).sums, dictionary, token_scores=False)
    tokens = TokenScores.zero(dictionary)
    tokens.add(gradient, hidden, dictionary)
    active = active_features(dictionary, hidden, gradient, answer, answer.roll(-1), torch.linspace(-1, 1, 11))
    return {
        "attribution": scores.attribution,
        "chosen": scores.positive,
        "variance": scores.variance,
        "directions": dictionary.directions,
        "some directions": dictionary.rows([3, 20]),
        "activations": dictionary.encode(hidden),
        "token share": tokens.projected_squares,
        "activation attribution": tokens.activation_attribution,
        **{
            f"active {part}": torch.from_numpy(values) for part, values in zip("fmxespc", active, strict=True)
        },
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, msg=lambda text, name=name: f"{name}: {text}")


def test_raw_directions_in_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    dictionary = FeatureDictionary(raw(), "model.layers.0", "raw")
    whole = everything(dictionary)
    unit = torch.nn.functional.normalize(raw().double(), dim=1)
    G = torch.stack([step.sums[0] for step in steps()]).double()
    torch.testing.assert_close(whole["attribution"].double(), -G @ unit.T, rtol=1e-5, atol=1e-5)
    request.getfixturevalue("tiny_blocks")
    assert len(list(dictionary.chunks())) == 5
    assert_same(everything(dictionary), whole)


@pytest.mark.parametrize(("architecture", "settings", "kept"), VARIANTS)
def test_an_sae_in_slices(
    architecture: str, settings: dict[str, Any], kept: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Offloaded or kept in bfloat16, an SAE is that of the same weights in float32, computed with whole."""
    sae = make_sae(architecture, **settings)
    for name, value in sae.named_parameters():
        if name.startswith("W_"):
            value.data = value.to(kept).float()
    plain, hidden = load_dictionary(sae), hidden_states(11)
    whole = everything(plain)
    rebuilt = plain.reconstruct(hidden, plain.encode(hidden))
    request.getfixturevalue("tiny_blocks")
    stored = load_dictionary(sae, dtype=kept, offload=True)
    assert {stored.decoder.dtype, stored.encoder.sae.W_enc.dtype} == {kept}
    if kept == torch.float32:
        stored.encoder._is_whole = lambda device: False  # as if the hidden states were on another device
    assert_same(everything(stored), whole)
    torch.testing.assert_close(stored.reconstruct(hidden, stored.encode(hidden)), rebuilt)
    slope = torch.randn(FEATURES, generator=torch.Generator().manual_seed(5))
    found, expected = (
        torch.autograd.grad((one.encoder.activations(h) @ slope).sum(), h)[0]
        for one in (stored, plain)
        for h in [hidden.clone().requires_grad_(True)]
    )
    torch.testing.assert_close(found, expected)


def test_slices_are_wide_enough_for_top_k(tiny_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "_SLICE_BYTES", 1)
    encoder = load_dictionary(make_sae("topk"), dtype=torch.bfloat16).encoder
    widths = [part.W_enc.shape[1] for part in encoder._slices(torch.device("cpu"))]
    assert min(widths) >= ACTIVE
    assert sum(widths) == FEATURES
    assert len(widths) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_are_off_by_no_more_than_is_said(dtype: torch.dtype) -> None:
    """|error| ≤ Σ_j |v_j·d_fj| / 127 in bfloat16, an eighth of that in float16, against float64; and not 0."""
    generator = torch.Generator().manual_seed(6)
    rows, vectors = (torch.randn(n, 640, generator=generator) for n in (400, 50))
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    full = FeatureDictionary(rows, "model.layers.0", "full")
    kept = FeatureDictionary(rows, "model.layers.0", "kept", dtype=dtype)
    assert kept.decoder.nbytes == full.decoder.nbytes // 2
    assert kept.identity == full.identity
    error = (kept.project(vectors).double() - vectors.double() @ unit.T).abs()
    bound = vectors.double().abs() @ unit.abs().T / (127 if dtype == torch.bfloat16 else 8 * 127)
    assert float((error / bound).max()) <= 1
    assert float((error / bound).max()) > 0.01
    typical = float(error.square().mean().sqrt() / vectors.norm(dim=1).mean())
    assert (
        typical < 1e-4 if dtype == torch.bfloat16 else typical < 1e-5
    )  # of a length; a random cosine is 0.04


def test_what_is_saved_in_fewer_bits_is_kept_so(tmp_path: Path) -> None:
    """No bit is lost by it: the scores are those of the same values in float32."""
    make_sae("jumprelu").save_model(tmp_path)
    weights = {
        name: value.bfloat16() for name, value in load_file(tmp_path / "sae_weights.safetensors").items()
    }
    save_file(weights, tmp_path / "sae_weights.safetensors")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    kept, full = load_dictionary(tmp_path), load_dictionary(tmp_path, dtype=torch.float32)
    assert (kept.decoder.dtype, full.decoder.dtype) == (torch.bfloat16, torch.float32)
    assert kept.identity == full.identity
    assert_same(everything(kept), everything(full))


def test_a_large_dictionary_is_mapped_not_read(tmp_path: Path) -> None:
    """Loading and projecting 256 MiB of weights takes a fraction of that in memory of the process's own."""
    features, width = 65536, 512
    make_sae("jumprelu").save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"d_in": width, "d_sae": features}))
    vector = torch.zeros(features)
    decoder = torch.randn(features, width)
    weights = {
        "W_dec": decoder,
        "W_enc": decoder.T.contiguous(),
        "b_enc": vector,
        "threshold": vector.clone(),
    }
    save_file(weights | {"b_dec": torch.zeros(width)}, tmp_path / "sae_weights.safetensors")
    code = """
import ctypes, sys, threading, torch
from trl_sae_audit import load_dictionary
torch.set_num_threads(1)
import trl_sae_audit.saes.loading
def own():
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and not yet given back is no question of what is kept
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
dictionary = load_dictionary(sys.argv[1])  # once, for what libraries take at first use
dictionary.project(torch.randn(2, 512)); del dictionary
before = own()
dictionary = load_dictionary(sys.argv[1])
dictionary.project(torch.randn(4, 512))
print(own() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 40


def test_an_offloaded_dictionary_stays_where_it_is() -> None:
    """The device `meta` stands for a GPU: there are shapes on it, and no values."""
    for offload in (True, False):
        dictionary = load_dictionary(make_sae("jumprelu"), offload=offload).to("meta")
        there = {dictionary.decoder.device.type, dictionary.encoder.sae.W_enc.device.type}
        assert there == {"cpu" if offload else "meta"}
        assert dictionary.device.type == "meta"
        assert dictionary.project(hidden_states(3)).shape == (3, FEATURES)
        assert dictionary.encode(hidden_states(3)).device.type == "meta"
        assert dictionary.rows([1, 2]).device.type == "meta"


def test_token_scores_of_an_offloaded_dictionary_are_refused() -> None:
    dictionary = load_dictionary(make_sae("jumprelu"), offload=True)
    module = torch.nn.Identity()
    point = HookPoint("model.layers.0", module, module)
    FeatureTracker(
        dictionary, point, {}, token_scores=TokenScoreObserver(dictionary)
    )  # on the host nothing has to be sent
    with pytest.raises(AuditError, match="an offloaded one would go to the GPU each time"):
        FeatureTracker(dictionary.to("meta"), point, {}, token_scores=TokenScoreObserver(dictionary))


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"offload": True}])
def test_an_sae_that_needs_all_of_its_features_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(AuditError, match="all of its features at once"):
        load_dictionary(make_sae("matching_pursuit"), **options)


def test_a_type_that_is_none_is_refused() -> None:
    with pytest.raises(AuditError, match=r"cannot be kept as torch\.int8"):
        FeatureDictionary(torch.eye(3), "model.layers.0", "ints", dtype=torch.int8)
