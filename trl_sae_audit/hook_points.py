"""Hook points: from the names SAEs carry to the modules Hugging Face models have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .errors import AuditError

_TRANSFORMER_LENS = re.compile(r"^blocks\.(\d+)\.(?:hook_)?(.+)$")
_LAYER_OUTPUT = re.compile(r"\.(?:output|hook_resid_post)$")


@dataclass(frozen=True)
class HookPoint:
    """A module of one model whose output is the residual stream.

    `path` is its name in the model it was found in, `decoder` the module that owns the list of
    layers it stands in, whose last hidden state is what the logits are made of.
    """

    path: str
    module: nn.Module
    decoder: nn.Module


def layer_of(hook_name: str) -> int | None:
    """The layer whose output a TransformerLens name means; None if it is not such a name.

    Raises:
        AuditError: if the name is TransformerLens' but not of the residual stream between layers.
    """
    match = _TRANSFORMER_LENS.match(hook_name)
    if match is None:
        return None
    layer, place = int(match[1]), match[2]
    if place == "resid_post":
        return layer
    if place == "resid_pre" and layer > 0:
        return layer - 1
    raise AuditError(
        f"Hook point {hook_name!r} is not the output of a layer: attribution reads the residual stream "
        "(hook_resid_post). Take an SAE of the residual stream, or pass hook_point= with the path of the module "
        "whose output it reads and writes."
    )


def resolve_hook_point(model: nn.Module, hook_point: str) -> HookPoint:
    """Find the one module `hook_point` names in `model`, however deeply PEFT or a wrapper has nested it.

    Args:
        model: any Hugging Face model, wrapped or not.
        hook_point: TransformerLens' name, or a module path; a path matches as a suffix, so that
            `model.layers.9` is found in `base_model.model.model.layers.9`.

    Raises:
        AuditError: if no module, or more than one, has that name.
    """
    containers = layer_lists(model)
    layer = layer_of(hook_point)
    if layer is not None:
        path = _layer_path(containers, layer, hook_point)
        return HookPoint(path, model.get_submodule(path), _owner(model, path))
    wanted = _LAYER_OUTPUT.sub("", hook_point)
    paths = [name for name, _ in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
    if not paths:
        raise AuditError(
            f"Hook point {hook_point!r} is not in {type(model).__name__}, whose layers are "
            f"{_describe(containers)}; pass hook_point= with a path that exists."
        )
    if len(paths) > 1:
        raise AuditError(
            f"Hook point {hook_point!r} is ambiguous in {type(model).__name__}: it matches "
            f"{', '.join(paths[:4])}; pass hook_point= with a longer path."
        )
    return HookPoint(paths[0], model.get_submodule(paths[0]), _owner(model, paths[0]))


def layer_lists(model: nn.Module) -> dict[str, int]:
    """Paths of the lists of decoder layers in `model`, with their lengths.

    A list counts if the language model's configuration gives its length as the number of layers.
    """
    depths = {
        part.config.get_text_config().num_hidden_layers
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and hasattr(part.config.get_text_config(), "num_hidden_layers")
    }
    return {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in depths and not _is_vision(name)
    }


def residual_width(model: nn.Module) -> int:
    """Hidden size of the language model inside `model`.

    Raises:
        AuditError: if nothing in it is a Hugging Face model.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            return part.config.get_text_config().hidden_size
    raise AuditError(
        f"{type(model).__name__} contains no Hugging Face model, so its residual stream cannot be found; "
        "train a transformers model."
    )


def _layer_path(containers: dict[str, int], layer: int, hook_point: str) -> str:
    if not containers:
        raise AuditError(
            f"Hook point {hook_point!r} cannot be mapped: the model has no list of decoder layers; pass hook_point= "
            "with the path of the module to read."
        )
    if len(containers) > 1:
        raise AuditError(
            f"Hook point {hook_point!r} is ambiguous: the model has several lists of layers "
            f"({_describe(containers)}); pass hook_point= with the path of the layer meant."
        )
    ((path, depth),) = containers.items()
    if layer >= depth:
        raise AuditError(
            f"Hook point {hook_point!r} is layer {layer}, but the model's {path} has {depth} layers "
            f"(0 to {depth - 1}); the dictionary belongs to a deeper model, or pass another hook_point=."
        )
    return f"{path}.{layer}"


def _owner(model: nn.Module, path: str) -> nn.Module:
    """The innermost Hugging Face model around the module: the decoder that ends in the final norm."""
    parts = path.split(".")
    owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    for owner in reversed(owners):
        if isinstance(owner, PreTrainedModel):
            return owner
    return model


def _is_vision(name: str) -> bool:
    return any(part.startswith(("vision", "visual", "audio", "image")) for part in name.split("."))


def _describe(containers: dict[str, int]) -> str:
    return ", ".join(f"{path}.0 … {path}.{depth - 1}" for path, depth in containers.items()) or "unknown"
