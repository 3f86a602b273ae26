"""SAEs in every format that they are published in: files of the real layout, and what they compute by their own library's definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, FEATURES, K = 8, 24, 4
Weights = dict[str, Tensor]
Encode = Callable[[Tensor, Weights], Tensor]


def draw(**shapes: tuple[int, ...]) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        name.replace("__", "."): torch.randn(shape, generator=generator) * 0.5
        for name, shape in shapes.items()
    }


def linear(bias: str = "b_dec", encoder: str = "encoder", decoder: str = "decoder") -> Weights:
    weights = draw(enc=(FEATURES, WIDTH), bias=(FEATURES,), dec=(WIDTH, FEATURES), b=(WIDTH,))
    return {
        f"{encoder}.weight": weights["enc"],
        f"{encoder}.bias": weights["bias"],
        f"{decoder}.weight": weights["dec"],
        bias: weights["b"],
    }


def matrices(lower: bool = False) -> Weights:
    w = "w" if lower else "W"
    return draw(
        **{
            f"{w}_enc": (WIDTH, FEATURES),
            f"{w}_dec": (FEATURES, WIDTH),
            "b_enc": (FEATURES,),
            "b_dec": (WIDTH,),
        }
    )


def top(pre: Tensor, k: int) -> Tensor:
    values, places = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, places, values)


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return pre * (pre > threshold) * (pre > 0)


@dataclass(frozen=True)
class Case:
    """A format: where its files are, and what it does to hidden states h [n, d_model].

    `place` is what a user gives, below a folder. `acts` and `decode` are the library's own definition.
    """

    place: str
    weights: str
    tensors: Callable[[], Weights]
    acts: Encode
    decode: Callable[[Tensor, Weights], Tensor]
    configs: dict[str, Any]
    hook: str | None
    model: str | None = None


LLAMA_SCALE = WIDTH**0.5 / 3.0
SPARSIFY = {
    "expansion_factor": 3,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "d_in": WIDTH,
    "signed": False,
}


def trainer(kind: str, **own: Any) -> dict[str, Any]:
    settings = {
        "dict_class": kind,
        "layer": 14,
        "lm_name": "Qwen/Qwen3-1.7B",
        "submodule_name": "resid_post_layer_14",
    }
    return {"config.json": {"trainer": {**settings, **own}, "buffer": {"ctx_len": 1024}}}


LEARNED = "saes_Qwen_Qwen3-1.7B_batch_top_k/resid_post_layer_14/trainer_0"
R1 = {
    "d_model": WIDTH,
    "hook_point_in": "blocks.5.hook_resid_post",
    "dataset_average_activation_norm": {"in": 3.0},
}
CASES = {
    "gemma scope": Case(
        "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82",
        "params.npz",
        lambda: {**matrices(), "threshold": draw(t=(FEATURES,))["t"].abs()},
        lambda h, w: jump(h @ w["W_enc"] + w["b_enc"], w["threshold"]),
        lambda a, w: a @ w["W_dec"] + w["b_dec"],
        {},
        "blocks.12.hook_resid_post",
        "google/gemma-2-2b",
    ),
    "gemma scope 2": Case(
        "gemma-scope-2-4b-it/resid_post/layer_17_width_16k_l0_small",
        "params.safetensors",
        lambda: {**matrices(lower=True), "threshold": draw(t=(FEATURES,))["t"].abs()},
        lambda h, w: jump(h @ w["w_enc"] + w["b_enc"], w["threshold"]),
        lambda a, w: a @ w["w_dec"] + w["b_dec"],
        {
            "config.json": {
                "architecture": "jump_relu",
                "model_name": "gemma-v3-4b-it",
                "hf_hook_point_in": "model.layers.17.output",
            }
        },
        "model.layers.17.output",
        "google/gemma-3-4b-it",
    ),
    "llama scope": Case(
        "Llama3_1-8B-Base-L15R-8x",
        "checkpoints/final.safetensors",
        lambda: linear("decoder.bias"),
        # the threshold is on the scale of the activations themselves, and compared with what the decoder writes
        lambda h, w: _llama_scope(h, w),
        lambda a, w: (a @ w["decoder.weight"].T + w["decoder.bias"]) / LLAMA_SCALE,
        {
            "hyperparams.json": {
                "d_model": WIDTH,
                "d_sae": FEATURES,
                "hook_point_in": "blocks.15.hook_resid_post",
                "hook_point_out": "blocks.15.hook_resid_post",
                "jump_relu_threshold": 0.3,
                "act_fn": "jumprelu",
                "norm_activation": "dataset-wise",
                "dataset_average_activation_norm": {"in": 3.0, "out": 3.0},
                "sparsity_include_decoder_norm": True,
            }
        },
        "blocks.15.hook_resid_post",
    ),
    "llama scope r1 distill": Case(
        "Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L5R",
        "sae_weights.safetensors",
        lambda: {**linear("decoder.bias"), "log_jumprelu_threshold": draw(t=(FEATURES,))["t"]},
        lambda h, w: jump(
            h * LLAMA_SCALE @ w["encoder.weight"].T + w["encoder.bias"], w["log_jumprelu_threshold"].exp()
        ),
        lambda a, w: (a @ w["decoder.weight"].T + w["decoder.bias"]) / LLAMA_SCALE,
        {"config.json": R1},
        "blocks.5.hook_resid_post",
    ),
    "sparsify": Case(
        "sae-llama-3-8b-32x/layers.10",
        "sae.safetensors",
        lambda: {
            **draw(W_dec=(FEATURES, WIDTH), b_dec=(WIDTH,)),
            **{k: v for k, v in linear().items() if "encoder" in k},
        },
        # its own class subtracts b_dec whatever normalize_decoder says; its W_dec is [latents, d_in]
        lambda h, w: top((h - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], K),
        lambda a, w: a @ w["W_dec"] + w["b_dec"],
        {"cfg.json": SPARSIFY},
        "blocks.10.hook_resid_post",
    ),
    "dictionary_learning AutoEncoder": Case(
        LEARNED,
        "ae.safetensors",
        lambda: linear("bias"),
        lambda h, w: ((h - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu(),
        lambda a, w: a @ w["decoder.weight"].T + w["bias"],
        trainer("AutoEncoder"),
        "blocks.14.hook_resid_post",
        "Qwen/Qwen3-1.7B",
    ),
    "dictionary_learning AutoEncoderNew": Case(
        LEARNED,
        "ae.safetensors",
        lambda: linear("decoder.bias"),
        lambda h, w: (h @ w["encoder.weight"].T + w["encoder.bias"]).relu(),
        lambda a, w: a @ w["decoder.weight"].T + w["decoder.bias"],
        trainer("AutoEncoderNew"),
        "blocks.14.hook_resid_post",
    ),
    "dictionary_learning GatedAutoEncoder": Case(
        LEARNED,
        "ae.safetensors",
        lambda: {
            **{name: value for name, value in linear("decoder_bias").items() if name != "encoder.bias"},
            **draw(r_mag=(FEATURES,), gate_bias=(FEATURES,), mag_bias=(FEATURES,)),
        },
        lambda h, w: _gated((h - w["decoder_bias"]) @ w["encoder.weight"].T, w),
        lambda a, w: a @ w["decoder.weight"].T + w["decoder_bias"],
        trainer("GatedAutoEncoder"),
        "blocks.14.hook_resid_post",
    ),
    "dictionary_learning AutoEncoderTopK": Case(
        LEARNED,
        "ae.safetensors",
        lambda: {**linear(), "k": torch.tensor(K), "threshold": torch.tensor(-1.0)},
        lambda h, w: top((h - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], K),
        lambda a, w: a @ w["decoder.weight"].T + w["b_dec"],
        trainer("AutoEncoderTopK", k=K),
        "blocks.14.hook_resid_post",
    ),
    "dictionary_learning BatchTopKSAE": Case(
        LEARNED,
        "ae.safetensors",
        lambda: {**linear(), "k": torch.tensor(K), "threshold": torch.tensor(0.4)},
        lambda h, w: jump((h - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0.4),
        lambda a, w: a @ w["decoder.weight"].T + w["b_dec"],
        trainer("BatchTopKSAE", k=K),
        "blocks.14.hook_resid_post",
    ),
    "dictionary_learning MatryoshkaBatchTopKSAE": Case(
        LEARNED,
        "ae.safetensors",
        lambda: {**matrices(), "k": torch.tensor(K), "threshold": torch.tensor(0.4)},
        lambda h, w: jump((h - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0.4),
        lambda a, w: a @ w["W_dec"] + w["b_dec"],
        trainer("MatryoshkaBatchTopKSAE", k=K),
        "blocks.14.hook_resid_post",
    ),
    "dictionary_learning JumpReluAutoEncoder": Case(
        LEARNED,
        "ae.safetensors",
        lambda: {**matrices(), "threshold": draw(t=(FEATURES,))["t"].abs()},
        lambda h, w: jump(h @ w["W_enc"] + w["b_enc"], w["threshold"]),
        lambda a, w: a @ w["W_dec"] + w["b_dec"],
        trainer("JumpReluAutoEncoder"),
        "blocks.14.hook_resid_post",
    ),
    "qwen scope": Case(
        "SAE-Res-Qwen3.5-2B-Base-W32K-L0_4/layer12.sae.safetensors",
        "",
        lambda: {name: value.T.contiguous() if "W_" in name else value for name, value in matrices().items()},
        lambda h, w: top(h @ w["W_enc"].T + w["b_enc"], K),
        lambda a, w: a @ w["W_dec"].T + w["b_dec"],
        {},
        "model.layers.12",
        "Qwen/Qwen3.5-2B-Base",
    ),
    "goodfire": Case(
        "Llama-3.1-8B-Instruct-SAE-l19.safetensors",
        "",
        lambda: linear("decoder_linear.bias", "encoder_linear", "decoder_linear"),
        lambda h, w: (h @ w["encoder_linear.weight"].T + w["encoder_linear.bias"]).relu(),
        lambda a, w: a @ w["decoder_linear.weight"].T + w["decoder_linear.bias"],
        {},
        "blocks.19.hook_resid_post",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    "deepseek r1 distill": Case(
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.safetensors",
        "",
        lambda: linear("decoder.bias"),
        lambda h, w: (h @ w["encoder.weight"].T + w["encoder.bias"]).relu(),
        lambda a, w: a @ w["decoder.weight"].T + w["decoder.bias"],
        {},
        "blocks.19.hook_resid_post",
    ),
    "sae-lens before 6": Case(
        "gpt2/blocks.8.hook_resid_pre",
        "sae_weights.safetensors",
        lambda: {**matrices(), "scaling_factor": torch.ones(FEATURES)},
        lambda h, w: ((h - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(),
        lambda a, w: a @ w["W_dec"] + w["b_dec"],
        {
            "cfg.json": {
                "d_in": WIDTH,
                "d_sae": FEATURES,
                "hook_point": "blocks.8.hook_resid_pre",
                "dtype": "torch.float32",
            }
        },
        "blocks.8.hook_resid_pre",
    ),
    "sae-lens before 6, fine-tuned scale": Case(
        "gpt2/blocks.8.hook_resid_pre",
        "sae_weights.safetensors",
        lambda: {**matrices(), "scaling_factor": draw(t=(FEATURES,))["t"].exp()},
        lambda h, w: ((h - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(),
        lambda a, w: (a * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"],
        {
            "cfg.json": {
                "d_in": WIDTH,
                "d_sae": FEATURES,
                "hook_name": "blocks.8.hook_resid_pre",
                "dtype": "float32",
                "finetuning_scaling_factor": True,
            }
        },
        "blocks.8.hook_resid_pre",
    ),
    "sae-lens before 6, top k": Case(
        "gpt2/blocks.8.hook_resid_post",
        "sae_weights.safetensors",
        matrices,
        lambda h, w: top((h - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K),
        lambda a, w: a @ w["W_dec"] + w["b_dec"],
        {
            "cfg.json": {
                "d_in": WIDTH,
                "d_sae": FEATURES,
                "hook_name": "blocks.8.hook_resid_post",
                "dtype": "float32",
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": K},
            }
        },
        "blocks.8.hook_resid_post",
    ),
}


def _llama_scope(h: Tensor, w: Weights) -> Tensor:
    pre = h * LLAMA_SCALE @ w["encoder.weight"].T + w["encoder.bias"]
    return pre * (pre * w["decoder.weight"].norm(dim=0) > 0.3 * LLAMA_SCALE)


def _gated(pre: Tensor, w: Weights) -> Tensor:
    return (pre + w["gate_bias"] > 0) * (pre * w["r_mag"].exp() + w["mag_bias"]).relu()


def write(case: Case, below: Path) -> tuple[Path, Weights]:
    place, weights = below / case.place, case.tensors()
    file = place / case.weights if case.weights else place
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in weights.items()})
    else:
        save_file(weights, file)
    for name, content in case.configs.items():
        (place / name).write_text(json.dumps(content))
    return place, weights
