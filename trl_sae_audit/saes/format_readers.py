"""Readers of other libraries' SAEs: each gives what sae-lens needs to make the same SAE.

What an SAE expects of its input (a scale, a bias) is folded into its weights, so that it works on the plain residual stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import AuditError
from ..io.untrusted import read_json
from .sae_files import Parts, SaeFiles, Weights, make_parts


def _linear(weights: Weights, encoder: str = "encoder", decoder: str = "decoder") -> Weights:
    """W_enc, b_enc and W_dec of two `nn.Linear`."""
    state = {"W_enc": weights[f"{encoder}.weight"].T, "W_dec": weights[f"{decoder}.weight"].T}
    if f"{encoder}.bias" in weights:
        state["b_enc"] = weights[f"{encoder}.bias"]
    return state


def read_gemma_scope(files: SaeFiles) -> Parts:
    place = files.place.as_posix()
    if re.search(r"gemma-scope-[^/]*-(mlp|att)", place):
        raise AuditError(
            f"{str(files.place)!r} is an SAE of an MLP or of attention, not of the residual stream; take gemma-scope-…-res."
        )
    model = files.find(r"gemma-scope-([0-9]+b(?:-it|-pt)?)-")
    layer = files.find(r"layer_(\d+)")
    name = None if model is None else f"google/gemma-2-{model.removesuffix('-pt')}"
    state = {
        (f"W_{key[2:]}" if key.lower().startswith("w_") else key): value
        for key, value in files.weights.items()
    }
    if re.search(r"gemma-scope-[^/]*-transcoders", place):
        # trained with the norm's gain folded into the MLP: it reads what the norm makes before that
        places = {
            "hook_name": layer and f"blocks.{layer}.ln2.hook_normalized",
            "hook_name_out": layer and f"blocks.{layer}.hook_mlp_out",
        }
        return _transcoder("jumprelu_transcoder", state, {"model_name": name, **places})
    metadata = {"model_name": name, "hook_name": layer and f"blocks.{layer}.hook_resid_post"}
    return make_parts("jumprelu", state, metadata, subtracts_b_dec=False)


def _transcoder(architecture: str, state: Weights, metadata: Mapping[str, Any], **own: Any) -> Parts:
    """A transcoder that reads and writes at one width, as sae-lens makes one."""
    d_out = state["W_dec"].shape[-1]
    return make_parts(architecture, state, metadata, subtracts_b_dec=False, d_out=d_out, **own)


def read_gemma_scope_2(files: SaeFiles) -> Parts:
    hook = files.config["hf_hook_point_in"]
    model = "google/" + str(files.config["model_name"]).removeprefix("google/").replace("-v3", "-3")
    layer = files.find(r"layer_(\d+)")
    metadata = {
        "model_name": model.replace("-pt", "") if "270m" in model else model,
        "hf_hook_name": hook,
        "hook_name": layer and f"blocks.{layer}.hook_resid_post",
    }
    own = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    state = {name.replace("w_", "W_"): files.weights[name] for name in own}
    if "hf_hook_point_out" in files.config or "affine_skip_connection" in files.weights:
        if state["W_dec"].ndim != 2:
            raise AuditError(
                f"{str(files.place)!r} is a cross-layer transcoder: it writes in every layer above the one that it reads, and no "
                "gradient at one place can be read in that. Take a transcoder of one MLP, or an SAE of resid_post."
            )
        places = {"hf_hook_name": hook, "hf_hook_name_out": files.config.get("hf_hook_point_out")}
        places |= {"model_name": metadata["model_name"]}
        if "affine_skip_connection" not in files.weights:
            return _transcoder("jumprelu_transcoder", state, places)
        skip = {"W_skip": files.weights["affine_skip_connection"].T}  # its file has [d_in, d_out]
        return _transcoder("jumprelu_skip_transcoder", state | skip, places)
    return make_parts("jumprelu", state, metadata, subtracts_b_dec=False)


def _scale(files: SaeFiles, norm: Any) -> float:
    """√d over the mean norm of the activations that the SAE was trained on."""
    width = files.config["d_model"]
    if not all(
        isinstance(number, int | float) and math.isfinite(number) and number > 0 for number in (width, norm)
    ):
        raise AuditError(
            f"{str(files.place)!r} has a width of {width!r} and a mean norm of {norm!r}; copy it again."
        )
    return float(width) ** 0.5 / float(norm)


def read_llama_scope(files: SaeFiles) -> Parts:
    """Trained on activations of mean norm √d; the threshold in the file is on their own scale, as its proportion to their norm shows."""
    config = files.config
    _check_one_place(files, config["hook_point_in"], config["hook_point_out"])
    scale = _scale(files, config["dataset_average_activation_norm"]["in"])
    state = _linear(files.weights)
    threshold = torch.full(
        (state["W_dec"].shape[0],), float(config["jump_relu_threshold"]) * scale, dtype=torch.float32
    )
    if config.get("sparsity_include_decoder_norm"):
        threshold = threshold / state["W_dec"].float().norm(dim=1)
    state = {
        "W_enc": state["W_enc"].float() * scale,
        "b_enc": state["b_enc"].float(),
        "W_dec": state["W_dec"].float() / scale,
        "b_dec": files.weights["decoder.bias"].float() / scale,
        "threshold": threshold,
    }
    metadata = {"model_name": "meta-llama/Llama-3.1-8B", "hook_name": config["hook_point_in"]}
    subtracts = bool(config.get("apply_decoder_bias_to_pre_encoder", False))
    if subtracts:
        raise AuditError(
            f"{str(files.place)!r} subtracts its decoder's bias from the scaled input, which is not read here; take another."
        )
    return make_parts("jumprelu", state, metadata, subtracts_b_dec=False)


def read_llama_scope_r1(files: SaeFiles) -> Parts:
    config = files.config
    _check_one_place(files, config["hook_point_in"], config.get("hook_point_out", config["hook_point_in"]))
    norms = config.get("dataset_average_activation_norm") or {}
    norm = norms.get(config["hook_point_in"], norms.get("in")) if isinstance(norms, dict) else None
    if norm is None:
        raise AuditError(
            f"{str(files.place)!r} expects activations of a mean norm that its files do not record; load it by its release, "
            "llama_scope_r1_distill."
        )
    scale = _scale(files, norm)
    state = _linear(files.weights)
    state = {
        "W_enc": state["W_enc"].float() * scale,
        "b_enc": state["b_enc"].float(),
        "W_dec": state["W_dec"].float() / scale,
        "b_dec": files.weights["decoder.bias"].float() / scale,
        "threshold": files.weights["log_jumprelu_threshold"].float().exp(),
    }
    metadata = {
        "model_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "hook_name": config["hook_point_in"],
    }
    return make_parts("jumprelu", state, metadata, subtracts_b_dec=False)


def read_goodfire(files: SaeFiles) -> Parts:
    state = _linear(files.weights, "encoder_linear", "decoder_linear")
    state["b_dec"] = files.weights["decoder_linear.bias"]
    layer = files.find(r"-l(\d+)(?:\.[a-z]+)?$")
    model = files.find(r"/([^/]+)-SAE-l\d+")
    metadata = {
        "model_name": model and f"meta-llama/{model}",
        "hook_name": layer and f"blocks.{layer}.hook_resid_post",
    }
    return make_parts("standard", state, metadata, subtracts_b_dec=False)


def read_deepseek_r1(files: SaeFiles) -> Parts:
    state = {**_linear(files.weights), "b_dec": files.weights["decoder.bias"]}
    layer = files.find(r"-l(\d+)(?:\.[a-z]+)?$")
    metadata = {"hook_name": layer and f"blocks.{layer}.hook_resid_post"}
    return make_parts("standard", state, metadata, subtracts_b_dec=False)


def read_sparsify(files: SaeFiles) -> Parts:
    """EleutherAI's: the decoder's bias is always subtracted, whatever `normalize_decoder` says; `W_dec` is [latents, d_in]."""
    config = files.config
    kind = config.get("activation", "topk")
    transcodes = bool(config.get("transcode"))
    if not transcodes and (config.get("skip_connection") or files.place.name.endswith((".mlp", ".attn"))):
        raise AuditError(
            f"{str(files.place)!r} does not read and write the residual stream (an MLP or attention); take one called layers.N."
        )
    if config.get("normalize_io") or config.get("cross_layer"):
        raise AuditError(
            f"{str(files.place)!r} was trained with {'normalize_io' if config.get('normalize_io') else 'cross_layer'}, which is "
            "not read here; take another."
        )
    if kind != "topk" or config.get("signed"):
        raise AuditError(
            f"{str(files.place)!r} chooses its features by {'signed topk' if config.get('signed') else kind!r}, and "
            "only topk is read; take another."
        )
    state = {
        "W_enc": files.weights["encoder.weight"].T,
        "b_enc": files.weights["encoder.bias"],
        "W_dec": files.weights["W_dec"],
        "b_dec": files.weights["b_dec"],
    }
    model = _beside(files, "model")
    if transcodes:
        skip = files.weights.get("W_skip", torch.zeros(2 * state["W_dec"].shape[1:], dtype=torch.float32))
        place = files.find(r"/((?:layers|h)\.\d+\.mlp)$")
        places = {"hf_hook_name": place and f"{place}.input", "hf_hook_name_out": place and f"{place}.output"}
        metadata = {"model_name": model, **places}
        return _transcoder("topk_transcoder", {**state, "W_skip": skip}, metadata, k=config["k"])
    layer = files.find(r"layers[._](\d+)$")
    metadata = {"hook_name": layer and f"blocks.{layer}.hook_resid_post", "model_name": model}
    return make_parts("topk", state, metadata, subtracts_b_dec=True, k=config["k"])


def read_dictionary_learning(files: SaeFiles) -> Parts:
    trainer = files.config["trainer"]
    kind, place = trainer["dict_class"], str(trainer.get("submodule_name") or "resid_post")
    if "resid" not in place:
        raise AuditError(
            f"{str(files.place)!r} is a dictionary of {place}, not of the residual stream; take one of resid_post."
        )
    metadata = {
        "model_name": trainer.get("lm_name"),
        "hook_name": f"blocks.{trainer['layer']}.hook_resid_post",
    }
    weights = files.weights
    if kind == "AutoEncoder":
        state = {**_linear(weights), "b_dec": weights["bias"]}
        return make_parts("standard", state, metadata, subtracts_b_dec=True)
    if kind == "AutoEncoderNew":
        state = {**_linear(weights), "b_dec": weights["decoder.bias"]}
        return make_parts("standard", state, metadata, subtracts_b_dec=False)
    if kind == "GatedAutoEncoder":
        renamed = {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"}
        state = {**_linear(weights), **{ours: weights[theirs] for theirs, ours in renamed.items()}}
        return make_parts("gated", state, metadata, subtracts_b_dec=True)
    if kind == "AutoEncoderTopK":
        state = {**_linear(weights), "b_dec": weights["b_dec"]}
        return make_parts("topk", state, metadata, subtracts_b_dec=True, k=int(trainer["k"]))
    if kind not in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        raise AuditError(
            f"{str(files.place)!r} is a {kind} of dictionary_learning, which is not known here; take one of AutoEncoder, "
            "AutoEncoderNew, GatedAutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReluAutoEncoder."
        )
    state = (
        {name: weights[name] for name in ("W_enc", "b_enc", "W_dec")}
        if "W_enc" in weights
        else _linear(weights)
    )
    threshold = weights["threshold"].float()
    if kind != "JumpReluAutoEncoder" and bool((threshold < 0).any()):
        raise AuditError(
            f"{str(files.place)!r} never got its threshold: its training ended too early. Take another."
        )
    state |= {"b_dec": weights["b_dec"], "threshold": threshold.expand(state["b_enc"].shape[0])}
    return make_parts("jumprelu", state, metadata, subtracts_b_dec=kind != "JumpReluAutoEncoder")


def read_qwen_scope(files: SaeFiles) -> Parts:
    layer = files.require(r"layer(\d+)\.sae\.", "which layer they are of")
    k = files.require(r"SAE-Res-[^/]+-W\d+K-L0_(\d+)", "how many features are active")
    model = files.find(r"SAE-Res-([^/]+)-W\d+K-L0_\d+")
    state = {name: files.weights[name].T for name in ("W_enc", "W_dec")}
    state |= {name: files.weights[name] for name in ("b_enc", "b_dec")}
    metadata = {
        "model_name": f"Qwen/{model}",
        "hf_hook_name": f"model.layers.{layer}",
        "hook_name": f"blocks.{layer}.hook_resid_post",
    }
    return make_parts("topk", state, metadata, subtracts_b_dec=False, k=int(k))


def _check_one_place(files: SaeFiles, hook_in: str, hook_out: str) -> None:
    if hook_in != hook_out:
        raise AuditError(
            f"{str(files.place)!r} reads {hook_in} and writes {hook_out}: a transcoder of this format has a scale for either place, "
            "which is not read here. Take an SAE of the residual stream, or a transcoder of sae-lens' registry."
        )


def _beside(files: SaeFiles, name: str) -> str | None:
    """A setting of the run's own `config.json`, which lies beside the folders of its SAEs."""
    path = files.place.parent / "config.json"
    value = read_json(path).get(name) if path.is_file() else None
    return value if isinstance(value, str) else None
