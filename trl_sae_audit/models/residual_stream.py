"""The residual stream of a model on texts, token by token, without running the layers above."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_sinks import find_attention_sinks
from .batches import batched, pad
from .hook_points import HookPoint, replace_layer_output

Forward = Callable[[Mapping[str, Tensor]], object]
"""Runs a model on a tokenized batch."""

_SORTED_TOGETHER = 16  # batches whose windows are sorted by length, so that little is padding


@dataclass(frozen=True)
class TokenRules:
    """Which tokens of a text count.

    Attributes:
        context_size: longer texts are cut into windows of that many tokens, each with the tokenizer's BOS.
        skip_special_tokens: leave out BOS, EOS and the like.
        skip_first_position: leave out the first token of every window. With a BOS it is that; without one it is the
            token whose activation most models blow up, and which would then be most of the variance.
        skip_attention_sinks: leave out tokens of more than ten times the median norm of their window's.
    """

    context_size: int = 256
    skip_special_tokens: bool = True
    skip_first_position: bool = True
    skip_attention_sinks: bool = True


def token_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, context_size: int
) -> Iterator[list[int]]:
    """Token ids of the texts, cut into windows of at most `context_size`.

    A text that begins with the BOS token, as chat templates write it, does not get a second one.
    """
    special = set(tokenizer.all_special_ids)
    for text in texts:
        begins = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
        ids: list[int] = tokenizer(text, add_special_tokens=not begins, verbose=False)["input_ids"]
        prefix = ids[:1] if ids and ids[0] in special else []
        body = ids[len(prefix) :]
        step = context_size - len(prefix)
        for start in range(0, len(body), step):
            yield prefix + body[start : start + step]


def residual_stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    hook: HookPoint,
    rules: TokenRules,
    batch_size: int = 16,
) -> Iterator[Tensor]:
    """What `hook` puts out on the tokens of `texts` that count.

    Yields:
        [n, d_model] in float32 on the model's device, once a batch of windows; padding is never among the rows.
    """
    return residual_streams(model, tokenizer, texts, [hook], rules, batch_size)


def residual_streams(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    hooks: Sequence[HookPoint],
    rules: TokenRules,
    batch_size: int = 16,
) -> Iterator[Tensor]:
    """What several hook points put out in one forward pass, side by side: [n, hooks · d_model].

    An attention sink of one layer counts in none.
    """
    windows = token_windows(texts, tokenizer, rules.context_size)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    with evaluation_mode(model):
        while block := list(islice(windows, batch_size * _SORTED_TOGETHER)):
            block.sort(key=len)
            for some in batched(block, batch_size):
                ids, attended = pad(some)
                counts = attended.clone()
                if rules.skip_special_tokens:
                    counts &= ~torch.isin(ids, special)
                if rules.skip_first_position:
                    counts[:, 0] = False
                if bool(counts.any()):
                    states = hidden_states_at(hooks, {"input_ids": ids, "attention_mask": attended.long()})
                    kept = counts.to(states[0].device)
                    if rules.skip_attention_sinks:
                        counted = kept
                        for hidden in states:
                            kept = kept & ~find_attention_sinks(hidden, counted)
                    yield torch.cat([hidden[kept].to(torch.float32) for hidden in states], 1)


class _HookPointReached(Exception):  # noqa: N818, not an error
    """The forward pass has come to the hook point; what lies above is not needed."""


def run_until(point: HookPoint, forward: Callable[[], object], *, stop: bool = True) -> Tensor:
    """What is read at the hook point when `forward` runs its decoder; the pass ends there, and keeps its graph if it has one.

    With stop=False it runs to its end, as engines need it whose processes exchange parameters on the way.
    """
    captured: list[Tensor] = []

    def capture(hidden: Tensor) -> None:
        captured.append(hidden)
        if stop:
            raise _HookPointReached

    handle = point.on_read(capture)
    try:
        with contextlib.suppress(_HookPointReached):
            forward()
    finally:
        handle.remove()
    return captured[0]


@torch.no_grad()
def hidden_states(point: HookPoint, batch: Mapping[str, Tensor], forward: Forward | None = None) -> Tensor:
    """Hidden states [rows, tokens, d_model] that are read at the hook point, in evaluation mode; nothing above it is computed.

    Args:
        point: where to read; its decoder is run.
        batch: `input_ids` and `attention_mask`, [rows, tokens], on any device.
        forward: runs the whole model instead, see `engines.whole_forward`.
    """
    if forward is not None:
        with evaluation_mode(point.decoder):
            return run_until(point, lambda: forward(batch), stop=False)
    device = next(point.decoder.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    with evaluation_mode(point.decoder):
        return run_until(point, lambda: point.decoder(**inputs, use_cache=False))


@torch.no_grad()
def hidden_states_at(points: Sequence[HookPoint], batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Hidden states at several hook points of one decoder, in one forward pass that ends at the last of them."""
    if len(points) == 1:
        return [hidden_states(points[0], batch)]
    found: dict[int, Tensor] = {}

    def capture(number: int, hidden: Tensor) -> None:
        found[number] = hidden
        if len(found) == len(points):
            raise _HookPointReached

    decoder = points[0].decoder
    device = next(decoder.parameters()).device
    with contextlib.ExitStack() as stack:
        for number, point in enumerate(points):
            stack.callback(point.on_read(partial(capture, number)).remove)
        stack.enter_context(evaluation_mode(decoder))
        with contextlib.suppress(_HookPointReached):
            decoder(**{name: value.to(device) for name, value in batch.items()}, use_cache=False)
    return [found[number] for number in range(len(points))]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while, with every module's own mode restored after."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def last_hidden_state(decoder: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the logits are made of: [rows, tokens, d_model]."""
    output = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.last_hidden_state


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient for a while: none is computed, and no graph is built below a leaf."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class PointStates:
    """What passes a hook point in one forward pass, each [rows, tokens, d_model]; to be asked for after it.

    Attributes:
        written: the hook point's output, without its graph.
        read: what the encoder reads: the same, save for a transcoder.
        gradient: of the output, after a backward pass.
        leaf: the output where `leaf_at` cut the graph.
    """

    written: Tensor
    read: Tensor
    gradient: Tensor
    leaf: Tensor

    def write(self, point: HookPoint, hidden: Tensor) -> None:
        self.written = hidden.detach()
        if point.source is None:
            self.read = self.written


@contextlib.contextmanager
def _reading(point: HookPoint, found: PointStates) -> Iterator[None]:
    def see(hidden: Tensor) -> None:
        found.read = hidden.detach()

    handle = None if point.source is None else point.on_read(see)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextlib.contextmanager
def leaf_at(point: HookPoint, width: int) -> Iterator[PointStates]:
    """Cut the graph at the hook point: its output becomes a leaf that needs a gradient."""
    found = PointStates()

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        found.leaf = point.hidden_states(output, width).detach().requires_grad_(True)
        found.write(point, found.leaf)
        return replace_layer_output(output, found.leaf)

    handle = point.module.register_forward_hook(cut)
    try:
        with _reading(point, found):
            yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def gradient_at(point: HookPoint, width: int) -> Iterator[PointStates]:
    """Keep the hook point's hidden states and their gradient, with the graph below as it is."""
    found = PointStates()

    def keep(gradient: Tensor) -> None:
        found.gradient = gradient

    def watch(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = point.hidden_states(output, width)
        if not hidden.requires_grad:  # nothing below is trained
            hidden = hidden.detach().requires_grad_(True)
        hidden.register_hook(keep)
        found.write(point, hidden)
        return replace_layer_output(output, hidden)

    handle = point.module.register_forward_hook(watch)
    try:
        with _reading(point, found):
            yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Compute layers again in the backward pass where the model has gradient checkpointing on, which itself does so in training mode
    only."""
    layers = [
        part
        for part in model.modules()
        if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing
    ]
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
