"""Which tokens of PPO's rows are whose: PPO pads prompts on the left, and responses end at their first padding."""

from __future__ import annotations

import torch
from torch import Tensor


def until_padding(attended: Tensor, context_length: int) -> Tensor:
    """`attended` [rows, tokens] with each response ending at its first padding, as PPO has it."""
    response = attended[:, context_length:].long().cumprod(1).bool()
    return torch.cat([attended[:, :context_length], response], 1)


def split_rows(
    input_ids: Tensor, attended: Tensor, context_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses without padding."""
    rows = list(zip(input_ids, attended, strict=True))
    prompts = [ids[:context_length][kept[:context_length]].tolist() for ids, kept in rows]
    responses = [ids[context_length:][kept[context_length:]].tolist() for ids, kept in rows]
    return prompts, responses


def response_tokens(input_ids: Tensor, attended: Tensor, context_length: int, special: Tensor) -> Tensor:
    """Which tokens count for a score [rows, tokens]: the response's, but for special ones and the row's first."""
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    counted = attended & (place >= context_length) & (attended.cumsum(1) > 1)
    return counted & ~torch.isin(input_ids, special.to(input_ids.device))
