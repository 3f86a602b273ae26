"""A tap on the residual stream: reads the gradient that arrives at a hook point during the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import AuditError
from .hook_points import HookPoint

Observer = Callable[[Tensor, Tensor, "Tensor | None"], None]
"""Called with the gradient [B, T, d_model], the hidden states [B, T, d_model] and the loss positions [B, T]."""


@dataclass
class Pass:
    """One forward of the decoder under autograd.

    `ids` are its token ids [rows, tokens], None where it was given embeddings. `lengths` are those of the examples in its
    one row where several were packed into one, else None. `gradient` is Σ_t g[i,t] of every row, or of every packed
    example, [n, d_model] in float32; None as long as none has arrived.
    """

    ids: Tensor | None = None
    lengths: Tensor | None = None
    rows: int = 0
    calls: int = 0
    gradient: Tensor | None = None
    loss_positions: Tensor | None = None
    is_open: bool = True


class GradientTap:
    """Sums the gradient over tokens, row by row, for every forward of the decoder between `open` and `close`.

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
        self.loss_positions = loss_positions
        self._collecting = False
        self._passes: list[Pass] = []
        self._forward: Pass | None = None
        self._backward: Pass | None = None
        self._handles: list[RemovableHandle] = [
            point.decoder.register_forward_pre_hook(self._on_decoder_begin, with_kwargs=True),
            point.module.register_forward_hook(self._on_forward),
            point.decoder.register_forward_hook(self._on_decoder_end),
        ]

    def open(self) -> None:
        """Begin a micro-batch."""
        self._forget()
        self._collecting = True

    def close(self) -> list[Pass]:
        """End it: the forwards under autograd since `open`, in their order."""
        passes = self._passes
        self._forget()
        return passes

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._forget()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _forget(self) -> None:
        for one in self._passes:
            one.is_open = False
        self._collecting = False
        self._passes = []
        self._forward = self._backward = None

    @torch.compiler.disable
    def _on_decoder_begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._collecting and torch.is_grad_enabled():
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
            self._forward = Pass(ids, packed_lengths(kwargs))
            self._passes.append(self._forward)

    @torch.compiler.disable
    def _on_decoder_end(self, module: nn.Module, args: Any, output: Any) -> None:
        one, self._forward = self._forward, None
        if one is None:
            return
        if one.calls != 1:
            raise AuditError(
                f"Module {self.point.path!r} runs {one.calls} times in a forward of the model, so there is no one residual "
                "stream at its output; choose the hook point of a layer that runs once, and no dropping of layers."
            )
        last = token_output(output)
        if last is None or not last.requires_grad:
            return

        def on_gradient(gradient: Tensor) -> None:
            self._backward = one
            if self.loss_positions:
                one.loss_positions = (gradient != 0).any(-1)

        last.register_hook(on_gradient)

    @torch.compiler.disable
    def _on_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._collecting:
            return None
        one = self._forward
        if one is not None:
            one.calls += 1
            one.rows = self._hidden_state(output).shape[0]
        if not torch.is_grad_enabled():
            return None
        hidden = self._hidden_state(output)
        one = one or self._recomputed()
        replacement = None
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_(True)
            replacement = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        detached = hidden.detach() if self.observers else None
        hidden.register_hook(lambda gradient: self._arrived(one, gradient, detached))
        return replacement

    def _recomputed(self) -> Pass:
        """Which forward a layer belongs to that checkpointing runs again during the backward pass."""
        if self._backward is not None:
            return self._backward
        if len(self._passes) == 1:
            return self._passes[0]
        raise AuditError(
            f"Module {self.point.path!r} runs outside a forward of the model, and it cannot be told to which of "
            f"{len(self._passes)} its gradient belongs; use gradient_checkpointing_kwargs={{'use_reentrant': False}}."
        )

    def _arrived(self, one: Pass, gradient: Tensor, hidden: Tensor | None) -> None:
        if not one.is_open:
            raise AuditError(
                f"A gradient reached {self.point.path!r} after the training step in which its forward was made had ended; "
                "call backward within the same training_step."
            )
        if self.loss_positions and (one.gradient is not None or one.loss_positions is None):
            raise AuditError(
                "Token scores need a loss that goes through the decoder's last hidden state and one backward pass; leave "
                "token_scores out."
            )
        rows = _row_sums(gradient, one.lengths)
        one.gradient = rows if one.gradient is None else one.gradient + rows
        if hidden is not None:
            for observe in self.observers:
                observe(gradient, hidden, one.loss_positions)

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


def packed_lengths(kwargs: dict[str, Any]) -> Tensor | None:
    """Lengths of the examples that a forward's one row holds, from what it is called with; None if rows are examples.

    Without padding, examples lie in one row one after the other; attention keeps them apart by `cu_seq_lens_q`, or by
    position ids that begin anew.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        return kwargs["cu_seq_lens_q"].diff()
    places = kwargs.get("position_ids")
    if places is None or kwargs.get("attention_mask") is not None or places.ndim != 2 or len(places) != 1:
        return None
    starts = (places[0] == 0).nonzero().flatten()
    if len(starts) < 2 or starts[0] != 0:
        return None
    return torch.cat([starts, starts.new_tensor([places.shape[1]])]).diff()


def token_output(output: Any) -> Tensor | None:
    """What a decoder puts out for every token, [rows, tokens, width]; None if there is no such thing."""
    values = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    )
    return next((value for value in values if isinstance(value, Tensor) and value.ndim == 3), None)


def _row_sums(gradient: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return gradient.sum(1, dtype=torch.float32)
    sizes = lengths.tolist()
    if sum(sizes) != gradient.shape[1]:
        raise AuditError(
            f"{len(sizes)} examples of {sum(sizes)} tokens are packed into a row, but the model works on {gradient.shape[1]}: an "
            "adapter such as prompt tuning adds virtual tokens, and examples cannot be told apart. Train it without packing."
        )
    return torch.stack([part.sum(0, dtype=torch.float32) for part in gradient[0].split(sizes)])
