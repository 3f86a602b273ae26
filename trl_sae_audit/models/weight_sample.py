"""A few of a model's weights, by which it is recognised after it was saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PARAMETERS, VALUES = 8, 16
"""Parameters that are looked at, and weights of each."""
_WRAPPERS = ("_orig_mod.", "base_model.model.")
"""What torch.compile and PEFT put into the names of parameters, and what is saved does not have."""
_SAVED_AS = (torch.float32, torch.bfloat16, torch.float16)


def sample_weights(model: nn.Module) -> dict[str, Any]:
    """Some weights of trained parameters, spread over the model: name of the parameter, place in it, and value.

    Whoever has the same weights at all of these places is, after any training of its own, the same model.
    """
    trained = {
        _plain_name(name): parameter.detach().flatten()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point() and parameter.numel()
    }
    names: list[str] = []
    places: list[int] = []
    values: list[float] = []
    for name in _spread(list(trained), PARAMETERS):
        chosen = _spread(range(len(trained[name])), VALUES)
        names += [name] * len(chosen)
        places += chosen
        values += trained[name][chosen].float().tolist()
    return {"parameter": names, "place": places, "value": np.array(values, np.float32)}


def differing_parameter(model: nn.Module, sample: Mapping[str, Sequence[Any]]) -> str | None:
    """The first parameter of a loaded model that has other weights than were sampled; None if none has.

    Parameters that the model does not have, as after an adapter was merged, are not compared. Weights that were saved or loaded in
    half precision are compared in it.
    """
    present = {_plain_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    for name in dict.fromkeys(sample["parameter"]):
        rows = [row for row, other in enumerate(sample["parameter"]) if other == name]
        places = torch.tensor([int(sample["place"][row]) for row in rows])
        expected = torch.tensor([float(sample["value"][row]) for row in rows])
        if name not in present:
            continue
        if not 0 <= int(places.min()) <= int(places.max()) < present[name].numel():
            return name  # another shape
        found = present[name].flatten()[places.to(present[name].device)].float().cpu()
        if not any(_equal_in(found, expected, dtype) for dtype in _SAVED_AS):
            return name
    return None


def _equal_in(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(found, expected.to(dtype).float())


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread, the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[(number + 1) * len(items) // most - 1] for number in range(most)]
