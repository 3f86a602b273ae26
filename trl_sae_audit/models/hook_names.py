"""Names that SAEs carry for the place they read: which layer, or which module path, each of them means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import AuditError

SET_HOOK_POINT = (
    "give hook_point (on the command line --hook_point), a layer's number or the path of the module whose output the "
    "dictionary reads and writes"
)
"""The way out of a hook point that does not fit, in the words of both places."""

_TRANSFORMER_LENS = re.compile(r"^blocks\.(\d+)\.(?:hook_)?(.+)$")
_AFTER_LAYER = ("resid_post", "out")  # TransformerLens 2, and 3
_BEFORE_LAYER = ("resid_pre", "in")
_BY_LAYER = re.compile(r"^(?:resid_post_layer_|resid_post/layer_|layer_?)?(\d+)$")
_SUFFIX = re.compile(r"\.(?:output|hook_resid_post|hook_out)(?:\.0)?$")
_IN_LIST = re.compile(r"^(?:(?P<prefix>.+)\.)?(?P<list>layers|h|blocks|block)\.(?P<layer>\d+)$")
_LANGUAGE = (
    "base_model",
    "model",
    "language_model",
    "text_model",
    "transformer",
    "decoder",
    "backbone",
    "llm",
)


@dataclass(frozen=True)
class LayerName:
    """A name understood: the number of the layer whose output it means, or the path of a module.

    Attributes:
        layer: counted from 0; None for a path that names no layer of a list.
        path: without suffixes such as `.output`; None for a name that only counts layers.
    """

    layer: int | None
    path: str | None


def parse_hook_name(name: str) -> LayerName:
    """What a hook point's name means.

    Understood are module paths (`model.layers.9`, `model.layers.9.output`), numbers (`9`), TransformerLens' names
    (`blocks.9.hook_resid_post`, in its version 3 `blocks.9.hook_out`, or `blocks.10.hook_resid_pre` and `blocks.10.hook_in`,
    which are the output of layer 9), and `resid_post_layer_9` of dictionary_learning.

    Raises:
        AuditError: a name of TransformerLens that is not the residual stream between layers.
    """
    counted = _BY_LAYER.match(name)
    if counted:
        return LayerName(int(counted[1]), None)
    lens = _TRANSFORMER_LENS.match(name)
    if lens is None:
        return LayerName(None, _SUFFIX.sub("", name))
    layer, place = int(lens[1]), lens[2]
    if place in _AFTER_LAYER:
        return LayerName(layer, None)
    if place in _BEFORE_LAYER and layer > 0:
        return LayerName(layer - 1, None)
    raise AuditError(
        f"Hook point {name!r} is not the output of a layer: attribution reads the residual stream between layers "
        f"(hook_resid_post). Take an SAE of the residual stream, or {SET_HOOK_POINT}."
    )


def layer_in_list(path: str) -> tuple[str, int] | None:
    """The name of the list and the layer's number, of a path to a language model's layer under its usual prefixes.

    `model.layers.9` and `model.language_model.layers.9` are the same place in two classes of one model. None for other paths.
    """
    match = _IN_LIST.match(path)
    if match is None or not all(part in _LANGUAGE for part in (match["prefix"] or "model").split(".")):
        return None
    return match["list"], int(match["layer"])
