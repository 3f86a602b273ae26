"""The models people post-train, tiny but of their real classes, and SAEs of theirs in the layout of the hub's cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.worlds import made, make_tokenizer, save_model

WIDTH, FEATURES, K = 32, 96, 6
REVISION = "0123456789abcdef0123456789abcdef01234567"
_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


@dataclass(frozen=True)
class KnownModel:
    """A model that people train, and an SAE of it.

    Attributes:
        name: of its directory, as on the Hub.
        build: makes it, tiny, of its real class.
        release, sae_id: what `load_dictionary` is given.
        layer: path of the module that the SAE reads, as the model has it.
        repository, files: where the SAE's files are on the Hub, and what makes them.
        encode: what the SAE does to hidden states, by its own library's definition.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    release: str
    sae_id: str
    layer: str
    repository: str
    files: Callable[[Path], dict[str, Tensor]]
    encode: Callable[[Tensor, dict[str, Tensor]], Tensor]

    def save(self, directory: Path) -> tuple[Path, PreTrainedTokenizerFast]:
        tokenizer = make_tokenizer()
        save_model(self.build(), tokenizer, directory / self.name)
        return directory / self.name, tokenizer

    def cache(self, hub: Path) -> dict[str, Tensor]:
        """Put the SAE into the hub's cache, as a download does; gives its tensors."""
        repository = hub / f"models--{self.repository.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        return self.files(repository / "snapshots" / REVISION)


def _draw(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name.replace("__", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


def _write(file: Path, tensors: dict[str, Tensor], **configs: Any) -> dict[str, Tensor]:
    file.parent.mkdir(parents=True)
    save_file(tensors, file)
    for name, content in configs.items():
        (file.parent / f"{name}.json").write_text(json.dumps(content))
    return tensors


def _top(pre: Tensor, k: int) -> Tensor:
    values, places = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, places, values)


def _gemma_scope_2(snapshot: Path) -> dict[str, Tensor]:
    tensors = _draw(w_enc=(WIDTH, FEATURES), w_dec=(FEATURES, WIDTH), b_enc=(FEATURES,), b_dec=(WIDTH,))
    tensors["threshold"] = torch.full((FEATURES,), 0.5)
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-4b-it",
        "hf_hook_point_in": "model.layers.17.output",
    }
    return _write(
        snapshot / "resid_post/layer_17_width_16k_l0_medium/params.safetensors", tensors, config=config
    )


def _qwen_scope(snapshot: Path) -> dict[str, Tensor]:
    tensors = _draw(W_enc=(FEATURES, WIDTH), W_dec=(WIDTH, FEATURES), b_enc=(FEATURES,), b_dec=(WIDTH,))
    return _write(snapshot / "layer2.sae.safetensors", tensors)  # converted from layer2.sae.pt


def _batch_top_k(folder: str, model: str, layer: int) -> Callable[[Path], dict[str, Tensor]]:
    def write(snapshot: Path) -> dict[str, Tensor]:
        tensors = _draw(
            encoder__weight=(FEATURES, WIDTH),
            encoder__bias=(FEATURES,),
            decoder__weight=(WIDTH, FEATURES),
            b_dec=(WIDTH,),
        )
        tensors |= {"k": torch.tensor(K), "threshold": torch.tensor(0.5)}
        trainer = {"dict_class": "BatchTopKSAE", "k": K, "layer": layer, "lm_name": model}
        trainer["submodule_name"] = f"resid_post_layer_{layer}"
        config = {"trainer": trainer, "buffer": {"ctx_len": 1024}}
        return _write(snapshot / folder / "ae.safetensors", tensors, config=config)  # converted from ae.pt

    return write


def _res_jb(snapshot: Path) -> dict[str, Tensor]:
    tensors = _draw(W_enc=(WIDTH, FEATURES), W_dec=(FEATURES, WIDTH), b_enc=(FEATURES,), b_dec=(WIDTH,))
    config = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.2.hook_resid_pre",
        "hook_point_layer": 2,
        "d_in": WIDTH,
        "d_sae": FEATURES,
        "dtype": "torch.float32",
        "activation_fn_str": "relu",
        "prepend_bos": True,
        "context_size": 128,
    }
    return _write(snapshot / "blocks.2.hook_resid_pre/sae_weights.safetensors", tensors, cfg=config)


def _batch_top_k_encode(h: Tensor, w: dict[str, Tensor]) -> Tensor:
    pre = ((h - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    return pre * (pre > 0.5)


def _gemma() -> PreTrainedModel:
    text = {**_TEXT, "num_hidden_layers": 18, "sliding_window": 16}
    vision = {**_VISION, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    return made(Gemma3ForConditionalGeneration, config, 0)


def _qwen_3_5() -> PreTrainedModel:
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    vision = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 8}
    config = Qwen3_5Config(
        text_config={**_TEXT, **linear, "num_hidden_layers": 4}, vision_config=vision, image_token_id=63
    )
    return made(Qwen3_5ForConditionalGeneration, config, 0)


def _gpt2() -> PreTrainedModel:
    """With a mean in its residual stream, as the real one has."""
    config = GPT2Config(
        n_embd=WIDTH, n_layer=3, n_head=4, vocab_size=64, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    model = made(GPT2LMHeadModel, config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.bias"):
                parameter.add_(0.3)
    return model


QWEN3 = "saes_Qwen_Qwen3-1.7B_batch_top_k/resid_post_layer_2/trainer_0"
KNOWN = (
    KnownModel(
        "gemma-3-4b-it",
        _gemma,
        "gemma-scope-2-4b-it-res",
        "layer_17_width_16k_l0_medium",
        "model.language_model.layers.17",
        "google/gemma-scope-2-4b-it",
        _gemma_scope_2,
        lambda h, w: (pre := h @ w["w_enc"] + w["b_enc"]) * (pre > 0.5),
    ),
    KnownModel(
        "Qwen3.5-27B",
        _qwen_3_5,
        "qwen-scope-3.5-27b-w80k-l50",
        "layer2",
        "model.language_model.layers.2",
        "Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50",
        _qwen_scope,
        lambda h, w: _top(h @ w["W_enc"].T + w["b_enc"], 50),
    ),
    KnownModel(
        "Qwen3-1.7B",
        lambda: made(Qwen3ForCausalLM, Qwen3Config(**_TEXT, num_hidden_layers=4), 0),
        "someone/qwen3-1.7b-saes",
        QWEN3,
        "model.layers.2",
        "someone/qwen3-1.7b-saes",
        _batch_top_k(QWEN3, "Qwen/Qwen3-1.7B", 2),
        _batch_top_k_encode,
    ),
    KnownModel(
        "Llama-3.1-8B-Instruct",
        lambda: made(LlamaForCausalLM, LlamaConfig(**_TEXT, num_hidden_layers=4), 0),
        "llama-3.1-8b-instruct-andyrdt",
        "resid_post_layer_3_trainer_1",
        "model.layers.3",
        "andyrdt/saes-llama-3.1-8b-instruct",
        _batch_top_k("resid_post_layer_3/trainer_1", "meta-llama/Llama-3.1-8B-Instruct", 3),
        _batch_top_k_encode,
    ),
    KnownModel(
        "gpt2",
        _gpt2,
        "gpt2-small-res-jb",
        "blocks.2.hook_resid_pre",
        "transformer.h.1",
        "jbloom/GPT2-Small-SAEs-Reformatted",
        _res_jb,
        lambda h, w: ((h - h.mean(-1, keepdim=True) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(),
    ),
)
