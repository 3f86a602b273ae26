"""Jacobian–vector products: derivatives of what a model computes, along a direction in its parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import AuditError
from .optimizer_step import Tensors

logger = logging.getLogger(__name__)

Method = Literal["auto", "forward", "finite_difference"]

Function = Callable[[Mapping[str, Tensor]], Tensor]
"""Of the parameters, by name."""

_STRIDES = (1, 1 / 4, 4, 1 / 16, 16, 1 / 64, 64)
"""Steps of a finite difference that are tried, as multiples of the usual one."""
_AGREE = 0.05
_UNUSABLE = 0.5
"""Relative difference of two estimates: below the first they are taken for the same; above the second for noise."""


@dataclass(frozen=True)
class Line:
    """A direction times a scale, in the parameters' own types; empty for none."""

    along: Tensors
    scale: float


class Jvp:
    """Differentiates functions of some of a model's parameters.

    Forward differentiation is exact where every operation has a forward derivative. An operation without one does not
    always say so: a custom kernel may drop the derivative, of its own part or of all before it. So the first result of each
    kind of function is compared with a finite difference, and where the two disagree the finite difference is what is used.

    Args:
        model: is left as it is.
        parameters: those that move, by name.
        method: "forward", "finite_difference" (central), or "auto": forward, and differences where that cannot be had.

    Attributes:
        differentiating: whether what runs now is differentiated forward, at the parameters as they are.

    Raises:
        AuditError: an unknown method.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], method: Method = "auto") -> None:
        if method not in get_args(Method):
            raise AuditError(f"method is {method!r}; choose one of {', '.join(get_args(Method))}.")
        self.model = model
        self.parameters = parameters
        self.method: Method = method
        self.differentiating = False
        self._verified: set[str] = set()
        self._relative_step: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    def at(self, parameters: Mapping[str, Tensor], function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)` with other parameters in the model."""
        calling = _Calling(self.model, function)
        return functional_call(calling, {f"model.{name}": value for name, value in parameters.items()}, args)

    @torch.no_grad()
    def line(self, direction: Mapping[str, Tensor]) -> Line:
        """A direction in the parameters, made ready for any number of derivatives along it; takes one parameter size."""
        size = _norm(direction[name] for name in direction)
        if size == 0:
            return Line({}, 1.0)
        # as long as the parameters that move: in float16 a step of the optimizer would be rounded away
        scale = (
            _norm(value[direction[name] != 0] for name, value in self.parameters.items()) / size or 1 / size
        )
        return Line(
            {name: (direction[name] * scale).to(value) for name, value in self.parameters.items()}, scale
        )

    def derivative(
        self, function: Function, direction: Mapping[str, Tensor] | Line, kind: str = ""
    ) -> Tensor:
        """d/ds function(θ + s·direction) at s = 0.

        Args:
            function: of the parameters.
            direction: by parameter; a `line` where there are several derivatives along it.
            kind: functions of one kind run the same operations; the first of each is verified.

        Raises:
            AuditError: there is no forward derivative and the method is "forward", or the finite differences are noise.
        """
        line = direction if isinstance(direction, Line) else self.line(direction)
        along, scale = line.along, line.scale
        if not along:
            return torch.zeros_like(function(self.parameters))
        if self.method == "finite_difference":
            return self._usable_difference(function, along, kind) / scale
        try:
            found = self._forward(function, along)
        except NotImplementedError as error:
            return self._fall_back(function, along, kind, str(error)) / scale
        if kind not in self._verified:
            estimate = self._difference(function, along, kind)
            if not self._agree(found, estimate, kind):
                return self._fall_back(function, along, kind, "a finite difference disagrees") / scale
            if found is not None:
                self._verified.add(kind)
        if found is None:
            return torch.zeros_like(function(self.parameters))
        return found / scale

    def _forward(self, function: Function, along: Tensors) -> Tensor | None:
        """None where no derivative arrives: the parameters do not matter, or an operation dropped it."""
        self.differentiating = True
        try:
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                moving = {
                    name: forward_ad.make_dual(value.detach(), along[name])
                    for name, value in self.parameters.items()
                }
                tangent = forward_ad.unpack_dual(function(moving)).tangent
                return None if tangent is None else tangent.clone()
        finally:
            self.differentiating = False

    def _agree(self, found: Tensor | None, estimate: Tensor, kind: str) -> bool:
        if found is None:
            return not bool(estimate.any())
        gap = _norm([found - estimate])
        return gap <= (_AGREE + 3 * self._noise[kind]) * _norm([estimate])

    def _fall_back(self, function: Function, along: Tensors, kind: str, why: str) -> Tensor:
        if self.method == "forward":
            raise AuditError(
                f"{type(self.model).__name__} cannot be differentiated forward ({why.splitlines()[0]}); choose method 'auto' or "
                "'finite_difference'."
            )
        logger.info("No forward derivative (%s): finite differences are used.", why.splitlines()[0])
        self.method = "finite_difference"
        return self._usable_difference(function, along, kind)

    def _usable_difference(self, function: Function, along: Tensors, kind: str) -> Tensor:
        found = self._difference(function, along, kind)
        if self._noise[kind] > _UNUSABLE:
            raise AuditError(
                f"{type(self.model).__name__} computes too coarsely for finite differences, and has no forward derivative; load "
                "it in float32 for the lookahead."
            )
        return found

    def _difference(self, function: Function, along: Tensors, kind: str) -> Tensor:
        if kind not in self._relative_step:
            return self._choose_step(function, along, kind)
        return self._central(function, along, self._relative_step[kind])

    def _central(self, function: Function, along: Tensors, h: float) -> Tensor:
        ahead, behind = (
            function(
                {name: value.add(along[name], alpha=sign * h) for name, value in self.parameters.items()}
            )
            for sign in (1, -1)
        )
        return (ahead - behind) / (2 * h)

    def _choose_step(self, function: Function, along: Tensors, kind: str) -> Tensor:
        """Central difference with the step h, relative to ‖θ‖, at which the one of twice that step is closest to it.

        The error of the formula is of order h², that of rounding of order ε/h. `ε^⅓` balances them where the model computes
        as exactly as its parameters are kept and bends at the scale of its parameters. Neither is sure.
        """
        epsilon = max(torch.finfo(value.dtype).eps for value in self.parameters.values())
        best: tuple[float, float, Tensor] | None = None
        for stride in _STRIDES:
            h = min(epsilon ** (1 / 3), 0.01) * stride
            one, other = (self._central(function, along, factor * h) for factor in (1, 2))
            size = _norm([one])
            gap = _norm([one - other]) / size if size else 0.0
            if best is None or gap < best[0]:
                best = gap, h, one
            if gap < _AGREE / 5:
                break
        assert best is not None
        self._noise[kind], self._relative_step[kind], found = best
        return found


class _Calling(nn.Module):
    """A module that calls a function, so that `functional_call` can put other parameters into `model` meanwhile."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *args: Any) -> Tensor:
        return self._function(*args)


def _norm(tensors: Iterable[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(value.detach(), dtype=torch.float64) for value in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
