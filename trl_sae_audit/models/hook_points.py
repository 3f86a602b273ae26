"""Hook points: from the names SAEs carry to the modules Hugging Face models have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import AuditError
from .hook_names import SET_HOOK_POINT, layer_in_list, parse_hook_name

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "n_embed", "dim")


@dataclass(frozen=True)
class Source:
    """Where the encoder of a transcoder reads: before the place that its decoder writes, in the same layer.

    Attributes:
        path, module: of the model.
        side: whether it is the module's input, its output, or its input normalised without the gain that the module multiplies
            with (`ln2.hook_normalized` of TransformerLens).
        epsilon: of the normalisation. centred: whether that takes off the mean, as LayerNorm does and RMSNorm does not.
    """

    path: str
    module: nn.Module
    side: Literal["input", "output", "normalised"]
    epsilon: float = 0.0
    centred: bool = False

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """What the encoder reads [rows, tokens, d_model], of a call of the module.

        Raises:
            AuditError: if that is something else.
        """
        hidden = layer_output(output) if self.side == "output" else next(iter((*args, *kwargs.values())))
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise AuditError(
                f"The {'output' if self.side == 'output' else 'input'} of module {self.path!r} is not hidden states [rows, tokens, "
                "d_model], so a transcoder cannot read there; take an SAE of the residual stream."
            )
        if self.side != "normalised":
            return hidden
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        wide = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(hidden.dtype)


@dataclass(frozen=True)
class HookPoint:
    """A module of one model whose output is the residual stream, or what an MLP adds to it.

    `path` is its name in the model it was found in, `decoder` the module that owns the list of
    layers it stands in, whose last hidden state is what the logits are made of. `source` is where a
    transcoder reads; None for all dictionaries that read what they write.
    """

    path: str
    module: nn.Module
    decoder: nn.Module
    source: Source | None = None

    def on_read(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Show what the encoder reads, each time a forward pass comes to it."""
        source = self.source

        @torch.compiler.disable
        def show(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> None:
            see(layer_output(output) if source is None else source.states(args, kwargs, output))

        if source is None or source.side == "output":
            module = self.module if source is None else source.module
            return module.register_forward_hook(show, with_kwargs=True)
        return source.module.register_forward_pre_hook(show, with_kwargs=True)

    def hidden_states(self, output: Any, width: int) -> Tensor:
        """The residual stream [rows, tokens, width] in what the module returned.

        Raises:
            AuditError: if it is not in there, or of another width.
        """
        hidden = layer_output(output)
        if isinstance(hidden, Tensor) and hidden.ndim == 4 and hidden.shape[-1] == width:
            raise AuditError(
                f"{type(self.decoder).__name__} has no one residual stream: its layer {self.path!r} returns several that are mixed "
                f"with each other (shape {tuple(hidden.shape)}), and a gradient at one of them is not what the layer is asked "
                "for. Models of this kind (Gemma 3n, DeepSeek V4) cannot be attributed; take another model."
            )
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            kind = (
                f"tensor of shape {tuple(hidden.shape)}"
                if isinstance(hidden, Tensor)
                else type(hidden).__name__
            )
            raise AuditError(
                f"Module {self.path!r} returns a {kind}, not hidden states [rows, tokens, d_model]; {SET_HOOK_POINT}."
            )
        if hidden.shape[-1] != width:
            raise AuditError(
                f"Module {self.path!r} writes {hidden.shape[-1]} dimensions but the dictionary reads {width}; it belongs to "
                "another model or another place in this one."
            )
        return hidden


def layer_output(output: Any) -> Any:
    """The hidden states a decoder layer returned; layers of custom code, and whole decoders, return a tuple that begins with them."""
    return output[0] if isinstance(output, tuple | list | ModelOutput) and output else output


def replace_layer_output(output: Any, hidden: Tensor) -> Any:
    """What the layer returned, with `hidden` in place of its hidden states."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden


def resolve_hook_point(model: nn.Module, hook_point: str | Sequence[str]) -> HookPoint:
    """Find the one module that a hook point names in `model`, however deeply PEFT or a wrapper has nested it.

    Args:
        model: any Hugging Face model, wrapped or not.
        hook_point: one name, or several names of one place, tried in turn; `parse_hook_name` says which are understood. A
            path matches as a suffix, so that `model.layers.9` is found in `base_model.model.model.layers.9`, and across the
            prefixes of language models, so that it is found in `model.language_model.layers.9`.

    Raises:
        AuditError: if no module, or more than one, has one of the names.
    """
    names = (hook_point,) if isinstance(hook_point, str) else tuple(hook_point)
    paths: dict[str, str] = {}
    reasons: list[AuditError] = []
    for name in names:
        try:
            paths[name] = _find_path(model, name)
        except AuditError as error:
            reasons.append(error)
    if len(set(paths.values())) == 1:
        path = next(iter(paths.values()))
        return HookPoint(path, model.get_submodule(path), _owner(model, path))
    if paths:
        places = ", ".join(f"{name!r} is {path}" for name, path in paths.items())
        raise AuditError(
            f"The dictionary's names for its place contradict each other in {type(model).__name__} ({places}); "
            f"{SET_HOOK_POINT}."
        )
    if len(reasons) == 1:
        raise reasons[0]
    raise AuditError(
        f"None of the dictionary's names for its place is in {type(model).__name__}: {', '.join(map(repr, names))} were tried, "
        f"and its layers are {_describe(layer_lists(model))}; {SET_HOOK_POINT}."
    )


def layer_lists(model: nn.Module) -> dict[str, int]:
    """Paths of the lists of decoder layers in `model`, with their lengths.

    A list counts if the language model's configuration gives its length as the number of layers.
    """
    depths = {depth for config in _text_configs(model) for depth in _numbers(config, _DEPTHS)}
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) in depths and not _is_other_part(name)
        is_list = is_list and all(
            any(layer.children()) for layer in module
        )  # not of embeddings or projections
        if is_list and not any(name.startswith(f"{outer}.") for outer in lists):  # experts within a layer
            lists[name] = len(module)
    return lists


def residual_width(model: nn.Module) -> int:
    """Hidden size of the language model inside `model`.

    Raises:
        AuditError: if nothing in it is a Hugging Face model, or its configuration does not say.
    """
    config = next(_text_configs(model), None)
    if config is None:
        raise AuditError(
            f"{type(model).__name__} contains no Hugging Face model, so its residual stream cannot be found; "
            "train a transformers model."
        )
    widths = _numbers(config, _WIDTHS)
    if not widths:
        raise AuditError(
            f"The configuration of {type(model).__name__} does not say how wide its residual stream is ({', '.join(_WIDTHS)}); "
            "set config.hidden_size."
        )
    return widths[0]


def _find_path(model: nn.Module, name: str) -> str:
    meant = parse_hook_name(name)
    containers = layer_lists(model)
    if meant.path is None:
        assert meant.layer is not None
        return _layer_path(containers, meant.layer, name)
    modules = [path for path, _ in model.named_modules()]
    paths = [path for path in modules if path == meant.path] or [
        path for path in modules if path.endswith(f".{meant.path}") and not _is_other_part(path)
    ]
    if len(paths) > 1:
        raise AuditError(
            f"Hook point {name!r} is ambiguous in {type(model).__name__}: it matches {', '.join(paths[:4])}; "
            "give a longer path as hook_point (on the command line --hook_point)."
        )
    if paths:
        return paths[0]
    listed = layer_in_list(meant.path)
    own = {path: depth for path, depth in containers.items() if listed and path.endswith(listed[0])}
    if listed and own:
        return _layer_path(own, listed[1], name)
    raise AuditError(
        f"Hook point {name!r} is not in {type(model).__name__}, whose layers are {_describe(containers)}; {SET_HOOK_POINT}."
    )


def _layer_path(containers: dict[str, int], layer: int, hook_point: str) -> str:
    if not containers:
        raise AuditError(
            f"Hook point {hook_point!r} cannot be mapped: the model has no list of decoder layers as long as its "
            "configuration says; give the path of the module to read as hook_point (on the command line --hook_point)."
        )
    if len(containers) > 1:
        raise AuditError(
            f"Hook point {hook_point!r} is ambiguous: the model has several lists of layers "
            f"({_describe(containers)}); give the path of the layer meant as hook_point (on the command line --hook_point)."
        )
    ((path, depth),) = containers.items()
    if layer >= depth:
        raise AuditError(
            f"Hook point {hook_point!r} is layer {layer}, but the model's {path} has {depth} layers "
            f"(0 to {depth - 1}): the dictionary belongs to a deeper model. Take one of this model, or {SET_HOOK_POINT}."
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


def _text_configs(model: nn.Module) -> Iterator[PretrainedConfig]:
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            yield part.config.get_text_config()


def _numbers(config: PretrainedConfig, names: Sequence[str]) -> list[int]:
    """Those of the settings that the configuration has, whatever its family calls them."""
    values = [getattr(config, name) for name in names if hasattr(config, name)]
    return [value for value in values if isinstance(value, int) and value > 0]


def _is_other_part(name: str) -> bool:
    """Whether a path leads into what reads pictures or sounds, or predicts further tokens."""
    return any(
        part.startswith(("vision", "visual", "audio", "image", "speech", "mtp")) for part in name.split(".")
    )


def _describe(containers: dict[str, int]) -> str:
    return ", ".join(f"{path}.0 … {path}.{depth - 1}" for path, depth in containers.items()) or "unknown"
