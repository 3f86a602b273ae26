"""A hook on the residual stream: reads the gradient that arrives at a hook point during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import AuditError
from ..models.hook_points import HookPoint, replace_layer_output
from .responses import DrawnTokens, Responses
from .selection import RowSelections


@dataclass
class ForwardRecord:
    """One forward of the decoder under autograd, and the gradient that came back.

    Attributes:
        ids: its token ids [rows, tokens]; None where it was given embeddings.
        lengths: of the examples in its one row where several were packed into one, else None.
        rows: how many.
        calls: times the hook point's module ran in it.
        gradient: Σ_t g[i,t] of every row, or of every packed example, [n, d_model] in float32; None until one arrives.
        loss_positions: whose logits enter the loss, bool [rows, tokens]; None if they are not needed.
        responses: what the loss is computed from, if the trainer's forward shows it; otherwise None.
        last: the decoder's last hidden state and the gradient there, [rows, tokens, width] each; only where the hook keeps it,
            `responses` is None, and until the observers have seen it.
        drawn: response tokens chosen to be encoded, once for each time a gradient arrives; None where their weights cannot be
            known.
        selected: what they select for, after the backward pass.
        is_open: the micro-batch has not ended.
    """

    ids: Tensor | None = None
    lengths: Tensor | None = None
    rows: int = 0
    calls: int = 0
    gradient: Tensor | None = None
    loss_positions: Tensor | None = None
    responses: Responses | None = None
    last: tuple[Tensor, Tensor] | None = None
    drawn: list[DrawnTokens | None] = field(default_factory=list)
    selected: RowSelections | None = None
    is_open: bool = True


@dataclass(frozen=True)
class TokenView:
    """What an observer gets to see of the tokens of a forward, inside the backward pass.

    Attributes:
        gradient: at the hook point, [rows, tokens, d_model].
        hidden: the hidden states that the encoder reads, [rows, tokens, d_model].
        written: those whose gradient it is; the same, save for a transcoder.
        forward: whose tokens they are.
    """

    gradient: Tensor
    hidden: Tensor
    written: Tensor
    forward: ForwardRecord


Observer = Callable[[TokenView], None]


class GradientHook:
    """Sums the gradient over tokens, row by row, for every forward of the decoder between `open` and `close`.

    Only forwards under autograd count: reference and sampling passes run without. The sum is taken inside
    the backward pass, in float32, so no [tokens, d_model] copy outlives a micro-batch. Below a frozen prefix
    the output needs no gradient and autograd would stop above it: there the hook makes it a leaf, which changes
    no weight's gradient.

    Args:
        point: where to read.
        width: d_model, checked at the first forward.
        observers: want more than sums; called inside the backward pass, before the next layer's.
        loss_positions: also find out which positions' logits enter the loss, and tell the observers.
        keep_last: also give the observers the gradient at the last hidden state, where nobody calls `add_responses`.
    """

    def __init__(
        self,
        point: HookPoint,
        width: int,
        observers: Sequence[Observer] = (),
        *,
        loss_positions: bool = False,
        keep_last: bool = False,
    ) -> None:
        self.point = point
        self.width = width
        self.observers = observers
        self.loss_positions = loss_positions
        self.keep_last = keep_last
        self._is_open = False
        self._forwards: list[ForwardRecord] = []
        self._running: ForwardRecord | None = None
        self._ended: ForwardRecord | None = None
        self._in_backward: ForwardRecord | None = None
        self._read: Tensor | None = None
        # Registered before the first step: torch.compile ignores hooks that come after the first forward.
        self._handles: list[RemovableHandle] = [
            point.decoder.register_forward_pre_hook(self._on_decoder_begin, with_kwargs=True),
            point.module.register_forward_hook(self._on_forward),
            point.decoder.register_forward_hook(self._on_decoder_end),
        ]
        if point.source is not None and observers:
            self._handles.append(point.on_read(self._on_read))

    def open(self) -> None:
        """Begin a micro-batch."""
        self._forget()
        self._is_open = True

    def add_responses(self, responses: Responses) -> None:
        """Add the responses of the forward that has just ended: their gradient must be known before that of the hook point."""
        if self._ended is not None:
            self._ended.responses = responses

    def close(self) -> list[ForwardRecord]:
        """End it: the forwards under autograd since `open`, in their order."""
        forwards = self._forwards
        self._forget()
        return forwards

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._forget()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _forget(self) -> None:
        for forward in self._forwards:
            forward.is_open = False
        self._is_open = False
        self._forwards = []
        self._running = self._ended = self._in_backward = None
        self._read = None

    @torch.compiler.disable
    def _on_decoder_begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # By grad mode, for `module.training` is True in GRPO, RLOO and OnlineDPO while they generate.
        if self._is_open and torch.is_grad_enabled():
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
            self._running = ForwardRecord(ids, packed_lengths(kwargs))
            self._forwards.append(self._running)

    @torch.compiler.disable
    def _on_decoder_end(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, self._running = self._running, None
        if forward is None:
            return
        self._ended = forward
        if forward.calls == 0:
            raise AuditError(
                f"Module {self.point.path!r} does not show in a forward of the model, because layers are dropped or an old transformers "
                "hides the layers of a compiled model; train without layer dropping, and without torch_compile or with a newer "
                "transformers."
            )
        if forward.calls != 1:
            raise AuditError(
                f"Module {self.point.path!r} runs {forward.calls} times in a forward of the model, so there is no one residual "
                "stream at its output; choose the hook point of a layer that runs once."
            )
        last = token_output(output)
        if last is None or not last.requires_grad:
            return
        kept = last.detach() if self.keep_last else None

        def on_gradient(gradient: Tensor) -> None:
            # The backward pass of this forward begins here, above all layers that checkpointing will run again.
            self._in_backward = forward
            if self.loss_positions:
                # Trainers mask, shift and fuse their heads in many ways. A row of this gradient is zero, exactly,
                # where a position's logits do not enter the loss, whatever the trainer.
                forward.loss_positions = (gradient != 0).any(-1)
            if kept is not None and forward.responses is None:
                forward.last = (kept, gradient)

        last.register_hook(on_gradient)

    @torch.compiler.disable
    def _on_read(self, hidden: Tensor) -> None:
        # The same layer's output comes next: of this pass, or of this layer when checkpointing runs it again.
        self._read = hidden.detach() if self._is_open and torch.is_grad_enabled() else None

    @torch.compiler.disable
    def _on_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._is_open or (self._running is None and not torch.is_grad_enabled()):
            return None
        hidden = self.point.hidden_states(output, self.width)
        if self._running is not None:
            self._running.calls += 1
            self._running.rows = hidden.shape[0]
        # Reentrant checkpointing runs the layer without autograd first, and again with it in the backward pass.
        if not torch.is_grad_enabled():
            return None
        forward = self._running or self._find_recomputed()
        replacement = None
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_(True)
            replacement = replace_layer_output(output, hidden)
        # Detached, or the closure would keep the graph alive that owns it.
        written = hidden.detach() if self.observers else None
        read, self._read = written if self.point.source is None else self._read, None
        hidden.register_hook(lambda gradient: self._add_gradient(forward, gradient, read, written))
        return replacement

    def _find_recomputed(self) -> ForwardRecord:
        """Which forward a layer belongs to that checkpointing runs again during the backward pass."""
        if self._in_backward is not None:
            return self._in_backward
        if len(self._forwards) == 1:
            return self._forwards[0]
        raise AuditError(
            f"Module {self.point.path!r} runs outside a forward of the model, and it cannot be told to which of "
            f"{len(self._forwards)} its gradient belongs; use gradient_checkpointing_kwargs={{'use_reentrant': False}}."
        )

    def _add_gradient(
        self, forward: ForwardRecord, gradient: Tensor, read: Tensor | None, written: Tensor | None
    ) -> None:
        if not forward.is_open:
            raise AuditError(
                f"A gradient reached {self.point.path!r} after the training step in which its forward was made had ended; "
                "call backward within the same training_step."
            )
        if self.loss_positions and (forward.gradient is not None or forward.loss_positions is None):
            raise AuditError(
                "Token scores need a loss that goes through the decoder's last hidden state and one backward pass; omit "
                "token_scores."
            )
        rows = _row_sums(gradient, forward.lengths)
        forward.gradient = rows if forward.gradient is None else forward.gradient + rows
        if read is not None and written is not None:
            view = TokenView(gradient, read, written, forward)
            for observe in self.observers:
                observe(view)
        forward.last = None


def packed_lengths(kwargs: dict[str, Any]) -> Tensor | None:
    """Lengths of the examples that a forward's one row holds, from what it is called with; None if rows are examples.

    Without padding, examples follow each other in one row; attention keeps them apart by `cu_seq_lens_q`, or by
    position ids that start at 0 again.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        return kwargs["cu_seq_lens_q"].diff()
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None:
        return None
    if positions.ndim != 2 or len(positions) != 1:
        return None
    starts = (positions[0] == 0).nonzero().flatten()
    if len(starts) < 2 or starts[0] != 0:
        return None
    return torch.cat([starts, starts.new_tensor([positions.shape[1]])]).diff()


def token_output(output: Any) -> Tensor | None:
    """A decoder's output for every token, [rows, tokens, width]; None if it has none."""
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
