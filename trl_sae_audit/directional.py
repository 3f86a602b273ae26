"""Derivatives of what a model computes, along a direction in its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import AuditError
from .update_rule import Tensors

METHODS = ("auto", "forward", "finite_difference")

Function = Callable[[Mapping[str, Tensor]], Tensor]
"""Of the parameters, by name."""


class Directional:
    """Differentiates functions of some of a model's parameters.

    Args:
        model: is left as it is.
        parameters: those that move, by name.
        method: "forward" differentiates forward, exact; "finite_difference" takes central differences, for models with
            an operation that has no forward derivative; "auto" falls back to it.

    Raises:
        AuditError: an unknown method.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], method: str = "auto") -> None:
        if method not in METHODS:
            raise AuditError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
        self.model = model
        self.parameters = parameters
        self.method = method

    def at(self, parameters: Mapping[str, Tensor], function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)` with other parameters in the model."""
        calling = _Calling(self.model, function)
        return functional_call(calling, {f"model.{name}": value for name, value in parameters.items()}, args)

    def derivative(self, function: Function, direction: Tensors) -> Tensor:
        """d/ds function(θ + s·direction) at s = 0."""
        if self.method != "finite_difference":
            try:
                return self._forward(function, direction)
            except NotImplementedError:
                if self.method == "forward":
                    raise
                self.method = "finite_difference"
        return self._difference(function, direction)

    def _forward(self, function: Function, direction: Tensors) -> Tensor:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            moving = {
                name: forward_ad.make_dual(value.detach(), direction[name].to(value))
                for name, value in self.parameters.items()
            }
            value, tangent = forward_ad.unpack_dual(function(moving))
            return torch.zeros_like(value) if tangent is None else tangent.clone()

    def _difference(self, function: Function, direction: Tensors) -> Tensor:
        """Central difference with `‖h·direction‖ = ε^⅓ ‖θ‖`: the error of the formula, of order h², and that of
        rounding, of order ε/h, are then alike."""
        size = _norm(direction.values())
        if size == 0:
            return torch.zeros_like(function(self.parameters))
        epsilon = torch.finfo(next(self.model.parameters()).dtype).eps
        h = epsilon ** (1 / 3) * _norm(self.parameters.values()) / size
        ahead, behind = (
            function({name: value + sign * h * direction[name] for name, value in self.parameters.items()})
            for sign in (1, -1)
        )
        return (ahead - behind) / (2 * h)


class _Calling(nn.Module):
    """A module that calls a function, so that `functional_call` can put other parameters into `model` meanwhile."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *args: Any) -> Tensor:
        return self._function(*args)


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([value.detach().double().square().sum() for value in tensors]).sum().sqrt())
