"""A tap on the residual stream: reads the gradient that arrives at a hook point during the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import AuditError
from .hook_points import HookPoint

Observer = Callable[[Tensor, Tensor, "Tensor | None"], None]
"""Called with the gradient [B, T, d_model], the hidden states [B, T, d_model] and the loss positions [B, T]."""


class GradientTap:
    """Sums the gradient over tokens, row by row, for every forward between `open` and `close`.

    Only forwards under autograd count: reference and sampling passes run without. The sum is taken inside
    the backward pass, in float32, so no [tokens, d_model] copy outlives a micro-batch. Below a frozen prefix
    the output needs no gradient and autograd would stop above it: there the tap makes it a leaf, which changes
    no weight's gradient.

    Args:
        point: where to read.
        width: d_model, checked at the first forward.
        observers: want more than sums; called inside the backward pass, before the next layer's.
        loss_positions: also find out which positions' logits enter the loss, from where the gradient
            at the decoder's last hidden state is not zero, and tell the observers.
    """

    def __init__(
        self,
        point: HookPoint,
        width: int,
        observers: tuple[Observer, ...] = (),
        *,
        loss_positions: bool = False,
    ) -> None:
        self.point = point
        self.width = width
        self.observers = observers
        self._collecting = False
        self._rows_seen = 0
        self._arrivals: dict[int, Tensor] = {}
        self._loss_positions: Tensor | None = None
        self._handles: list[RemovableHandle] = [point.module.register_forward_hook(self._on_forward)]
        if loss_positions:
            self._handles.append(point.decoder.register_forward_hook(self._on_decoder_forward))

    def open(self) -> None:
        """Begin a micro-batch."""
        self._rows_seen = 0
        self._arrivals = {}
        self._collecting = True

    def close(self) -> Tensor | None:
        """End it: Σ_t g[i,t] of every row in forward order [rows, d_model], None if no gradient arrived."""
        self._collecting = False
        self._loss_positions = None
        arrivals, self._arrivals = self._arrivals, {}
        if not arrivals:
            return None
        return torch.cat([arrivals[first] for first in sorted(arrivals)])

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._collecting = False
        self._arrivals = {}
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.compiler.disable
    def _on_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not (self._collecting and torch.is_grad_enabled()):
            return None
        hidden = self._hidden_state(output)
        replacement = None
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_(True)
            replacement = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        first, self._rows_seen = self._rows_seen, self._rows_seen + hidden.shape[0]
        detached = hidden.detach() if self.observers else None

        def on_gradient(gradient: Tensor) -> None:
            rows = gradient.sum(1, dtype=torch.float32)
            arrived = self._arrivals.get(first)
            self._arrivals[first] = rows if arrived is None else arrived + rows
            if detached is not None:
                for observe in self.observers:
                    observe(gradient, detached, self._loss_positions)

        hidden.register_hook(on_gradient)
        return replacement

    @torch.compiler.disable
    def _on_decoder_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not (self._collecting and torch.is_grad_enabled()):
            return
        last = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

        def on_gradient(gradient: Tensor) -> None:
            self._loss_positions = (gradient != 0).any(-1)

        if last.requires_grad:
            last.register_hook(on_gradient)

    def _hidden_state(self, output: Any) -> Tensor:
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise AuditError(
                f"Module {self.point.path!r} returns {_describe(output)}, not hidden states [rows, tokens, d_model]; "
                "choose the hook point of a decoder layer."
            )
        if hidden.shape[-1] != self.width:
            raise AuditError(
                f"Module {self.point.path!r} writes {hidden.shape[-1]} dimensions but the dictionary reads {self.width}; "
                "it belongs to another model or another place in this one."
            )
        return hidden


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"
