"""Attention sinks: tokens whose hidden state many models blow up, by position or by what they are."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_NORM = 10.0
"""Times the median norm of the row's tokens: what authors of SAEs leave out of their training."""


def find_attention_sinks(hidden: Tensor, counted: Tensor) -> Tensor:
    """Which counted tokens have more than ten times the median norm of their row's counted tokens: bool [rows, tokens].

    Qwen has some at any position, about one in a thousand, with norms of a hundred to a thousand times the median. No SAE
    is trained on them; a feature that reads one is active as on no other token. By row, so that a token's verdict does not depend
    on what else is in the batch.

    Args:
        hidden: [rows, tokens, d_model].
        counted: bool [rows, tokens].
    """
    norms = torch.linalg.vector_norm(hidden.detach().to(torch.float32), dim=-1)
    median = norms.masked_fill(~counted, torch.nan).nanmedian(1, keepdim=True).values
    return counted & (norms > LARGEST_NORM * median)
