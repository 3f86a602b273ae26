"""Attention sinks: tokens whose hidden state many models blow up, by position or by what they are."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_NORM = 10.0
"""Times the median norm of the row's tokens: what authors of SAEs leave out of their training."""


def find_attention_sinks(hidden: Tensor, counted: Tensor, among: Tensor | None = None) -> Tensor:
    """Which tokens have more than ten times the median norm of their row's counted tokens: bool [rows, tokens].

    Qwen has some at any position, about one in a thousand, with norms of a hundred to a thousand times the median. No SAE
    is trained on them; a feature that reads one is active as on no other token. By row, so that a token's verdict does not depend
    on what else is in the batch, but for a row in which several examples are packed. Nothing waits for the device, and nothing is
    copied but the norms.

    Args:
        hidden: [rows, tokens, d_model].
        counted: bool [rows, tokens].
        among: the tokens asked about; by default those that are counted.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    norms = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=wide)
    known = counted & ~norms.isnan()
    # not `nanmedian`, which CUDA refuses where deterministic algorithms are asked for
    ordered = norms.masked_fill(~known, torch.inf).sort(1).values
    median = ordered.gather(1, (known.sum(1, keepdim=True) - 1).clamp_min(0) // 2)
    return (counted if among is None else among) & (norms > LARGEST_NORM * median)


def silent_tokens(
    hidden: Tensor, counted: Tensor, among: Tensor | None = None, *, attention_sinks: bool
) -> Tensor:
    """At which tokens no feature counts as active: the attention sinks, or none where `attention_sinks` counts them too.

    Arguments and shapes are those of `find_attention_sinks`.
    """
    if attention_sinks:
        return torch.zeros_like(counted)
    return find_attention_sinks(hidden, counted, among)
