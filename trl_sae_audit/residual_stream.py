"""The residual stream of a model on texts, token by token, without running the layers above."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .hook_points import HookPoint

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
    """

    context_size: int = 256
    skip_special_tokens: bool = True
    skip_first_position: bool = True


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
    windows = token_windows(texts, tokenizer, rules.context_size)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    with evaluation_mode(model):
        while block := list(islice(windows, batch_size * _SORTED_TOGETHER)):
            block.sort(key=len)
            for start in range(0, len(block), batch_size):
                ids, attended = _pad(block[start : start + batch_size])
                counts = attended.clone()
                if rules.skip_special_tokens:
                    counts &= ~torch.isin(ids, special)
                if rules.skip_first_position:
                    counts[:, 0] = False
                if bool(counts.any()):
                    hidden = hidden_states(hook, {"input_ids": ids, "attention_mask": attended.long()})
                    yield hidden[counts.to(hidden.device)].to(torch.float32)


class _Reached(Exception):  # noqa: N818, not an error
    """The forward pass has come to the hook point; what lies above is not needed."""


def stopped_at(point: HookPoint, forward: Callable[[], object], *, stop: bool = True) -> Tensor:
    """What the hook point puts out when `forward` runs its decoder; the pass ends there, and keeps its graph if it has one.

    With stop=False it runs to its end, as engines need it whose processes exchange parameters on the way.
    """
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)
        if stop:
            raise _Reached

    handle = point.module.register_forward_hook(capture)
    try:
        with contextlib.suppress(_Reached):
            forward()
    finally:
        handle.remove()
    return captured[0]


@torch.no_grad()
def hidden_states(point: HookPoint, batch: Mapping[str, Tensor], forward: Forward | None = None) -> Tensor:
    """Hidden states [rows, tokens, d_model] at the hook point, in evaluation mode; nothing above it is computed.

    Args:
        point: where to read; its decoder is run.
        batch: `input_ids` and `attention_mask`, [rows, tokens], on any device.
        forward: runs the whole model instead, see `engines.whole_forward`.
    """
    if forward is not None:
        with evaluation_mode(point.decoder):
            return stopped_at(point, lambda: forward(batch), stop=False)
    device = next(point.decoder.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    with evaluation_mode(point.decoder):
        return stopped_at(point, lambda: point.decoder(**inputs, use_cache=False))


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


def _pad(windows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids, right-padded with 0, and which of them are real: both [rows, longest]."""
    lengths = torch.tensor([len(window) for window in windows])
    longest = int(lengths.max())
    ids = torch.tensor([window + [0] * (longest - len(window)) for window in windows])
    return ids, torch.arange(longest) < lengths[:, None]
