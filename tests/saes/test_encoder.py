"""What an SAE expects of the residual stream is done to it before it encodes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.saes import CONFIGS, make_sae
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from trl_sae_audit import load_dictionary
from trl_sae_audit.models.hook_points import resolve_hook_point

WIDTH = 8


def gpt2() -> GPT2LMHeadModel:
    """With a mean in its residual stream, as the real one has."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=WIDTH, n_layer=4, n_head=2, vocab_size=30, n_positions=16)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.bias"):
                parameter.add_(0.3)
    return model


def center_writing_weights(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """What TransformerLens makes of it: everything that writes to the residual stream writes with mean 0."""
    centered = copy.deepcopy(model)
    stream = centered.transformer
    centered.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for embedding in (stream.wte.weight, stream.wpe.weight):
            embedding.sub_(embedding.mean(-1, keepdim=True))
        for block in stream.h:
            for writes in (block.attn.c_proj, block.mlp.c_proj):
                writes.weight.sub_(writes.weight.mean(-1, keepdim=True))
                writes.bias.sub_(writes.bias.mean())
    return centered


def states(model: GPT2LMHeadModel, hook_point: str) -> Tensor:
    seen: list[Tensor] = []
    handle = resolve_hook_point(model, hook_point).module.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(torch.arange(24).reshape(2, 12))
    handle.remove()
    return seen[0].reshape(-1, WIDTH)


@pytest.fixture
def trained_on_centered(tmp_path: Path) -> Path:
    sae: SAE = make_sae("standard")
    sae.cfg.metadata = SAEMetadata(
        model_name="gpt2-small",
        hook_name="blocks.2.hook_resid_pre",
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )
    sae.save_model(tmp_path / "sae")
    return tmp_path / "sae"


def test_a_centered_sae_reads_a_plain_model_as_the_model_it_was_trained_on(trained_on_centered: Path) -> None:
    model, dictionary = gpt2(), load_dictionary(trained_on_centered)
    plain = states(model, dictionary.hook_point)
    expected = states(center_writing_weights(model), dictionary.hook_point)
    assert plain.mean(-1).abs().max() > 0.1
    torch.testing.assert_close(plain - plain.mean(-1, keepdim=True), expected, atol=1e-5, rtol=1e-4)
    sae = SAE.load_from_disk(trained_on_centered)
    torch.testing.assert_close(dictionary.encode(plain), sae.encode(expected), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sae.encode(plain), sae.encode(expected), atol=1e-2)
    reconstructed = dictionary.reconstruct(plain, dictionary.encode(plain))
    torch.testing.assert_close(plain - reconstructed, expected - sae(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_others_are_not_centered(architecture: str) -> None:
    sae = make_sae(architecture)
    hidden = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)) + 3
    assert torch.equal(load_dictionary(sae).encode(hidden), sae.encode(hidden))
