"""Where a transcoder reads and writes in a Hugging Face model: an MLP's input, and what the MLP adds to the residual stream."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from torch import nn
from transformers import PretrainedConfig

from ..errors import AuditError
from .hook_points import HookPoint, Source, resolve_hook_point

_MODULE = re.compile(
    r"^(?P<layer>(?:.+\.)?(?:layers|h|blocks|block)\.\d+)\.(?P<part>.+)\.(?P<side>input|output)$"
)
_LENS = re.compile(r"^blocks\.(?P<layer>\d+)\.(?P<part>(?:.+\.)?hook_.+)$")
_MLPS = ("mlp", "feed_forward")
_AFTER = re.compile(r"^post_?(?:feedforward|feed_forward|mlp|ff|ffn|moe)_.*norm")
_BEFORE = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


def resolve_transcoder(model: nn.Module, reads: str, writes: str) -> HookPoint:
    """The place that a transcoder writes, with the place that it reads as its source.

    Understood are a module of a layer with `.input` or `.output` (`model.layers.9.pre_feedforward_layernorm.output`), found
    under the prefixes of language models, and TransformerLens' names: `mlp.hook_in`, and `ln2.hook_normalized`, which is without the
    norm's gain, to read; `mlp.hook_out`, and `hook_mlp_out`, which is after the norm where a model has one after its MLP, to write.

    Raises:
        AuditError: a name that is not understood or not in the model, or that means one place here and another there.
    """
    layer, source = _find_source(model, reads)
    above, path = _find_output(model, writes)
    if layer.path != above.path:
        raise AuditError(
            f"The transcoder reads {reads!r} and writes {writes!r}, in another layer: its features act through the layers "
            "between, and a gradient at one place does not tell what they do. Take a transcoder of one MLP."
        )
    return replace(above, path=path, module=model.get_submodule(path), source=source)


def _find_source(model: nn.Module, name: str) -> tuple[HookPoint, Source]:
    layer, part, side = _parse(model, name)
    if side is not None:
        path = _path(layer, part, name)
        return layer, Source(path, layer.module.get_submodule(part), side)
    if part == "mlp.hook_in":
        mlp = _mlp(layer, name)
        return layer, Source(f"{layer.path}.{mlp}", layer.module.get_submodule(mlp), "input")
    if part == "ln2.hook_normalized":
        return layer, _normalised(layer, name)
    if part == "hook_mlp_in":
        raise AuditError(
            f"The transcoder reads {name!r}, which in TransformerLens is before the norm of the MLP, and in some releases after it; "
            "set hf_hook_name in the transcoder's metadata to the one that it was trained on, such as "
            f"{layer.path}.mlp.input."
        )
    raise _unknown(name)


def _find_output(model: nn.Module, name: str) -> tuple[HookPoint, str]:
    layer, part, side = _parse(model, name)
    if side == "output":
        return layer, _path(layer, part, name)
    if part == "mlp.hook_out":
        return layer, f"{layer.path}.{_mlp(layer, name)}"
    if part == "hook_mlp_out":
        after = _after(layer)
        if len(after) > 1:
            raise AuditError(
                f"The transcoder writes {name!r}, and {type(layer.module).__name__} has several norms after its MLP "
                f"({', '.join(after)}), so what it adds cannot be told; set hf_hook_name_out in the transcoder's metadata."
            )
        return layer, f"{layer.path}.{after[0] if after else _mlp(layer, name)}"
    raise _unknown(name)


def _parse(model: nn.Module, name: str) -> tuple[HookPoint, str, Literal["input", "output"] | None]:
    """The layer, the part of it, and the side of that part where the name is a module's path."""
    lens = _LENS.match(name)
    if lens is not None:
        return resolve_hook_point(model, lens["layer"]), lens["part"], None
    module = _MODULE.match(name)
    if module is None:
        raise _unknown(name)
    side: Literal["input", "output"] = "input" if module["side"] == "input" else "output"
    return resolve_hook_point(model, module["layer"]), module["part"], side


def _path(layer: HookPoint, part: str, name: str) -> str:
    if part not in dict(layer.module.named_modules()):
        children = ", ".join(child for child, _ in layer.module.named_children())
        raise AuditError(
            f"The transcoder's {name!r} is not in this model, whose layer {layer.path} has {children}; it was made for another."
        )
    return f"{layer.path}.{part}"


def _mlp(layer: HookPoint, name: str) -> str:
    children = [child for child, _ in layer.module.named_children()]
    found = [child for child in children if child in _MLPS]
    if len(found) != 1:
        raise AuditError(
            f"The transcoder's {name!r} cannot be found: which part of {layer.path} is its MLP cannot be told "
            f"({', '.join(children)}); set hf_hook_name and hf_hook_name_out in the transcoder's metadata."
        )
    return found[0]


def _after(layer: HookPoint) -> list[str]:
    """Norms between the MLP and the residual stream."""
    return [child for child, _ in layer.module.named_children() if _AFTER.match(child)]


def _normalised(layer: HookPoint, name: str) -> Source:
    children = dict(layer.module.named_children())
    norm = next((child for child in _BEFORE if child in children), None)
    if norm is None or (_after(layer) and norm != _BEFORE[0]):
        raise AuditError(
            f"The transcoder's {name!r} cannot be found: which norm of {layer.path} comes before its MLP cannot be told "
            f"({', '.join(children)}); take an SAE of the residual stream."
        )
    module = children[norm]
    if isinstance(module, nn.LayerNorm):
        return Source(f"{layer.path}.{norm}", module, "normalised", module.eps, centred=True)
    config = layer.decoder.config
    epsilon = (
        config.get_text_config().to_dict().get("rms_norm_eps")
        if isinstance(config, PretrainedConfig)
        else None
    )
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float):
        raise AuditError(
            f"The transcoder's {name!r} cannot be computed: {layer.path}.{norm} is a {type(module).__name__}, of which it is not "
            "known how it normalises; take an SAE of the residual stream."
        )
    return Source(f"{layer.path}.{norm}", module, "normalised", epsilon)


def _unknown(name: str) -> AuditError:
    return AuditError(
        f"The transcoder's place {name!r} is not known; known are a module of a layer with .input or .output, and mlp.hook_in, "
        "ln2.hook_normalized, mlp.hook_out and hook_mlp_out of TransformerLens. Take a transcoder of one MLP."
    )
