"""What an optimizer would do with a gradient, without doing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...errors import AuditError

if TYPE_CHECKING:
    from transformers import TrainingArguments

Tensors = dict[str, Tensor]
"""Parameter name → tensor of its shape."""


@dataclass(frozen=True)
class AffineUpdate:
    """A step taken apart: `Δθ = offset − scale ⊙ g`, with g the mean gradient before clipping.

    `scale` depends on g itself (Adam divides by its size), so this is what the step is, not what another gradient
    would make of it. `offset` is what moves without g: momentum from earlier steps and weight decay; a parameter that has neither is left out.
    """

    scale: Tensors
    offset: Tensors

    def step(self, gradient: Mapping[str, Tensor]) -> Tensors:
        """Δθ for the gradient it was made from."""
        step = {name: -self.scale[name] * value for name, value in gradient.items()}
        for name, value in self.offset.items():
            step[name] += value
        return step


@dataclass(frozen=True)
class BatchMoments:
    """How gradients vary over the batches of a run.

    Attributes:
        second: of a parameter, by name, the mean of their squares after clipping; asked for once each, as it may be given away.
        clip: the mean clip factor.
    """

    second: Callable[[str], Tensor]
    clip: float


@dataclass(frozen=True)
class _ParameterState:
    """One parameter's hyperparameters and state."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    step: int = 0
    first: Tensor | None = None
    second: Tensor | None = None


@dataclass(frozen=True)
class UpdateRule:
    """An optimizer's next step.

    Args:
        kind: "adamw" (Loshchilov & Hutter 2019, as in torch) or "sgd", with momentum.
        learning_rate: the change is proportional to it.
        betas, eps: Adam's.
        momentum: SGD's.
        weight_decay: decoupled for adamw, added to the gradient for sgd; on parameters of two or more dimensions,
            as the Trainer does.
        max_grad_norm: gradients of a larger norm are scaled down to it; None for no clipping.
        batch_size: examples in a step of the run, to look ahead to its usual step instead of its first: AdamW's second
            moment is then the mean square of the gradients of such batches, so that a parameter whose gradient is
            mostly noise moves little, and clipping its mean factor. Of the first step, None, every parameter moves by the learning rate.
        state: from a running optimizer, by `from_optimizer`; otherwise this is the first step.

    Raises:
        AuditError: for an unknown kind.
    """

    kind: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    batch_size: int | None = None
    state: Mapping[str, _ParameterState] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "sgd"):
            raise AuditError(
                f"The optimizer is {self.kind!r}, whose step is not known here; choose 'adamw' or 'sgd'."
            )

    @classmethod
    def from_args(cls, args: TrainingArguments) -> UpdateRule:
        """The usual step of a trainer with these arguments, on one process, at the full learning rate.

        Raises:
            AuditError: for an optimizer whose step is not known here.
        """
        name = str(args.optim.value if hasattr(args.optim, "value") else args.optim)
        kind: Any = (
            "sgd" if name == "sgd" else "adamw" if name.startswith(("adamw_torch", "adamw_hf")) else name
        )
        return cls(
            kind,
            args.learning_rate,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None,
            batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        )

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, Tensor],
        max_grad_norm: float | None = None,
    ) -> UpdateRule:
        """The next step of a running `torch.optim.AdamW` or `SGD`.

        Args:
            optimizer: is not changed.
            parameters: name → the very tensors it optimizes.
            max_grad_norm: of the trainer.

        Raises:
            AuditError: for another optimizer, or options of it that change its step in ways not known here.
        """
        kinds: dict[type, Literal["adamw", "sgd"]] = {torch.optim.AdamW: "adamw", torch.optim.SGD: "sgd"}
        if type(optimizer) not in kinds:
            raise AuditError(
                f"The optimizer is a {type(optimizer).__name__}, whose step is not known here; pass a torch.optim.AdamW "
                "or SGD, or an UpdateRule."
            )
        by_tensor = {id(value): name for name, value in parameters.items()}
        state: dict[str, _ParameterState] = {}
        for group in optimizer.param_groups:
            for option in ("amsgrad", "maximize", "nesterov", "dampening"):
                if group.get(option):
                    raise AuditError(
                        f"The optimizer has {option}={group[option]}, which is not known here; switch it off."
                    )
            for value in group["params"]:
                if id(value) in by_tensor:
                    state[by_tensor[id(value)]] = _state_of(group, optimizer.state.get(value, {}))
        missing = set(parameters) - set(state)
        if missing:
            raise AuditError(
                f"The optimizer does not hold {min(missing)!r}; make it from the model's own parameters."
            )
        return cls(kinds[type(optimizer)], max_grad_norm=max_grad_norm, state=state)

    @property
    def wants_batches(self) -> bool:
        """Whether `affine` needs the batches' moments: AdamW, from no running optimizer, with a batch size."""
        return self.kind == "adamw" and self.batch_size is not None and not self.state

    def affine(
        self,
        gradient: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        batches: BatchMoments | None = None,
    ) -> AffineUpdate:
        """The step for the mean gradient [by parameter], taken apart.

        Args:
            gradient: mean over the examples, before clipping; not needed where `wants_batches`.
            parameters: as they are.
            batches: how the gradient varies over the run's batches, where `wants_batches`.
        """
        clip = self.clip(gradient) if batches is None else batches.clip
        scale: Tensors = {}
        offset: Tensors = {}
        for name in parameters:
            settings = self.state.get(name) or self._fresh(parameters[name])
            if batches is not None:
                root = batches.second(name).sqrt_().add_(settings.eps)
                scale[name] = root.reciprocal_().mul_(settings.learning_rate * clip)
                moving = None
            else:
                make = _adamw if self.kind == "adamw" else _sgd
                scale[name], moving = make(settings, gradient[name].detach(), clip)
            for each in (moving, _decay(settings, parameters[name].detach().to(scale[name].dtype))):
                if each is not None:
                    offset[name] = offset[name] + each if name in offset else each
        return AffineUpdate(scale, offset)

    def describe(self) -> dict[str, Any]:
        """For the record; a running optimizer's state is only mentioned."""
        names = ["kind", "learning_rate", "betas", "eps", "momentum", "weight_decay"]
        names += ["max_grad_norm", "batch_size"]
        described = {name: getattr(self, name) for name in names}
        return described | {"betas": list(self.betas), "steps_before": self._steps_before()}

    def _steps_before(self) -> int:
        return max((settings.step for settings in self.state.values()), default=0)

    def clip(self, gradient: Mapping[str, Tensor], factor: float = 1.0) -> float:
        """The factor of torch's clip_grad_norm_: `min(1, max / (‖g‖ + 1e-6))`, of a gradient times `factor`."""
        if self.max_grad_norm is None:
            return 1.0
        norms = [torch.linalg.vector_norm(value, dtype=torch.float64) for value in gradient.values()]
        norm = factor * float(torch.linalg.vector_norm(torch.stack(norms)))
        return min(1.0, self.max_grad_norm / (norm + 1e-6))

    def _fresh(self, parameter: Tensor) -> _ParameterState:
        decay = self.weight_decay if parameter.ndim > 1 else 0.0
        return _ParameterState(self.learning_rate, decay, self.betas, self.eps, self.momentum)


def _state_of(group: Mapping[str, Any], state: Mapping[str, Any]) -> _ParameterState:
    if "betas" in group:
        return _ParameterState(
            float(group["lr"]),
            group["weight_decay"],
            group["betas"],
            group["eps"],
            step=int(state["step"]) if state else 0,
            first=state["exp_avg"] if state else None,
            second=state["exp_avg_sq"] if state else None,
        )
    return _ParameterState(
        float(group["lr"]),
        group["weight_decay"],
        momentum=group["momentum"],
        first=state.get("momentum_buffer"),
    )


def _decay(settings: _ParameterState, parameter: Tensor) -> Tensor | None:
    rate = settings.learning_rate * settings.weight_decay
    return -rate * parameter if rate else None


def _adamw(settings: _ParameterState, gradient: Tensor, clip: float) -> tuple[Tensor, Tensor | None]:
    """Factor of the gradient, and what the momentum moves; in the gradient's type, whatever type the state is kept in."""
    beta1, beta2 = settings.betas
    step = settings.step + 1
    second = (1 - beta2) * (clip * gradient).square()
    if settings.second is not None:
        second = second + beta2 * settings.second.to(gradient.dtype)
    root = second.sqrt() / math.sqrt(1 - beta2**step) + settings.eps
    per_gradient = settings.learning_rate / (1 - beta1**step) / root
    moved = None if settings.first is None else -per_gradient * beta1 * settings.first.to(gradient.dtype)
    return per_gradient * (1 - beta1) * clip, moved


def _sgd(settings: _ParameterState, gradient: Tensor, clip: float) -> tuple[Tensor, Tensor | None]:
    rate = settings.learning_rate
    moved = None if settings.first is None else -rate * settings.momentum * settings.first.to(gradient.dtype)
    return torch.full_like(gradient, rate * clip), moved
