"""The residual stream of a model on texts, token by token, without running the layers above."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .hook_points import HookPoint

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
    training = model.training
    model.eval()
    try:
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
                    hidden = hidden_states(model, hook, ids, attended)
                    yield hidden[counts.to(hidden.device)].to(torch.float32)
    finally:
        model.train(training)


@torch.no_grad()
def hidden_states(model: nn.Module, hook: HookPoint, ids: Tensor, attended: Tensor) -> Tensor:
    """The output of `hook` [rows, tokens, d_model] on token ids, with the forward pass stopped there."""
    device = next(model.parameters()).device
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _Stop

    handle = hook.module.register_forward_hook(stop)
    try:
        model(input_ids=ids.to(device), attention_mask=attended.long().to(device), use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass at the hook point."""


def _pad(windows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids, right-padded with 0, and which of them are real: both [rows, longest]."""
    lengths = torch.tensor([len(window) for window in windows])
    longest = int(lengths.max())
    ids = torch.tensor([window + [0] * (longest - len(window)) for window in windows])
    return ids, torch.arange(longest) < lengths[:, None]
