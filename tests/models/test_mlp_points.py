"""Where transcoders read and write, in tiny models of every family that has transcoders or norms of its own around the MLP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.worlds import D_MODEL, made, make_config
from torch import Tensor, nn

from trl_sae_audit import AuditError
from trl_sae_audit.models.mlp_points import resolve_transcoder

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version

SMALL: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 8},
    "Gemma3": {"head_dim": 8},
    "Qwen3": {"head_dim": 8},
}
MODELS = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM"),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "Olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "Glm4": ("Glm4Config", "Glm4ForCausalLM"),
    "NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
}
WRITTEN = {
    "Gemma2": "post_feedforward_layernorm",
    "Gemma3": "post_feedforward_layernorm",
    "Olmo2": "post_feedforward_layernorm",
    "Glm4": "post_mlp_layernorm",
}


def make(name: str, tokenizer: Any) -> Any:
    config, kind = (getattr(transformers, each) for each in MODELS[name])
    if name == "GPT2":
        sizes = {"n_embd": D_MODEL, "n_layer": 3, "n_head": 4, "n_positions": 64}
        return made(kind, config(vocab_size=len(tokenizer), **sizes), 0).eval()
    return made(kind, make_config(tokenizer, config, **SMALL.get(name, {})), 0).eval()


def layer_of(model: nn.Module) -> str:
    return next(name for name, _ in model.named_modules() if name.endswith((".layers.1", ".h.1")))


def ids(tokenizer: Any) -> Tensor:
    return torch.randint(4, len(tokenizer), (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_the_layer_adds(name: str, tokenizer: Any) -> None:
    """Nothing comes between it and the residual stream: both have one gradient."""
    model = make(name, tokenizer)
    point = resolve_transcoder(model, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    assert point.path == f"{layer_of(model)}.{WRITTEN.get(name, 'mlp')}"
    seen: dict[str, Tensor] = {}

    def keep(place: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[place] = output[0] if isinstance(output, tuple) else output

        return hook

    point.module.register_forward_hook(keep("written"))
    model.get_submodule(layer_of(model)).register_forward_hook(keep("layer"))
    loss = model(ids(tokenizer)).logits.float().log_softmax(-1)[..., 5].sum()
    written, layer = torch.autograd.grad(loss, [seen["written"], seen["layer"]])
    torch.testing.assert_close(written, layer)
    assert layer.abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_mlps_input_is_read(name: str, tokenizer: Any) -> None:
    model = make(name, tokenizer)
    point = resolve_transcoder(model, "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")
    seen: list[Tensor] = []
    taken: list[Tensor] = []
    model.get_submodule(f"{layer_of(model)}.mlp").register_forward_pre_hook(
        lambda module, args: taken.append(args[0])
    )
    point.on_read(seen.append)
    model(ids(tokenizer))
    torch.testing.assert_close(seen, taken)
    assert point.path == f"{layer_of(model)}.mlp"


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Gemma3", "GPT2", "NeoX"])
def test_hook_normalized_is_without_the_gain(name: str, tokenizer: Any) -> None:
    """With the norm's gain, and bias, it is what the MLP gets."""
    model = make(name, tokenizer)
    point = resolve_transcoder(model, "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    assert point.source is not None
    norm = point.source.module
    with torch.no_grad():
        norm.weight.add_(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3)))
    seen: list[Tensor] = []
    given: list[Tensor] = []
    model.get_submodule(f"{layer_of(model)}.mlp").register_forward_pre_hook(
        lambda module, args: given.append(args[0])
    )
    point.on_read(seen.append)
    with torch.no_grad():
        model(ids(tokenizer))
    gain = norm.weight + 1 if name.startswith("Gemma") else norm.weight
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else 0.0
    torch.testing.assert_close(seen[0] * gain + bias, given[0], rtol=1e-4, atol=1e-4)


def test_a_modules_path_is_found_under_the_prefixes_of_a_multimodal_class(tokenizer: Any) -> None:
    text = make_config(tokenizer, transformers.Gemma3TextConfig, head_dim=8)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=1
    )
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    base = "model.layers.1"
    point = resolve_transcoder(
        model, f"{base}.pre_feedforward_layernorm.output", f"{base}.post_feedforward_layernorm.output"
    )
    assert point.path == "model.language_model.layers.1.post_feedforward_layernorm"
    assert point.source is not None
    assert point.source.path == "model.language_model.layers.1.pre_feedforward_layernorm"
    assert point.source.side == "output"


REFUSED = [
    ("Llama", "blocks.1.mlp.hook_in", "blocks.2.hook_mlp_out", "in another layer"),
    ("Llama", "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", "before the norm of the MLP"),
    ("Llama", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "'blocks.1.hook_resid_mid' is not known"),
    ("Llama", "blocks.1.mlp.hook_in", "blocks.1.hook_resid_post", "'blocks.1.hook_resid_post' is not known"),
    ("Llama", "blocks.1.mlp.hook_in", "model.layers.1.mlp.input", "is not known"),
    ("Llama", "blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out", "has 3 layers"),
    ("Llama", "model.layers.1.ffn.input", "model.layers.1.ffn.output", "it was made for another"),
    ("Olmo2", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", "which norm of .* comes before"),
]


@pytest.mark.parametrize(("name", "reads", "writes", "sentence"), REFUSED)
def test_refused(name: str, reads: str, writes: str, sentence: str, tokenizer: Any) -> None:
    with pytest.raises(AuditError, match=sentence):
        resolve_transcoder(make(name, tokenizer), reads, writes)


def test_several_norms_after_the_mlp_are_ambiguous(tokenizer: Any) -> None:
    model = make("Gemma2", tokenizer)
    model.model.layers[1].post_feedforward_layernorm_2 = nn.Identity()
    with pytest.raises(AuditError, match="several norms after its MLP"):
        resolve_transcoder(model, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


def test_a_layer_without_an_mlp(tokenizer: Any) -> None:
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64
    )
    with pytest.raises(AuditError, match=r"which part of .* is its MLP cannot be told"):
        resolve_transcoder(
            transformers.OPTForCausalLM(config), "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
        )
