"""A feature's activations over the tokens of a response, made one number."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import AuditError
from .dictionary import FeatureDictionary

Pooling = Literal["max", "mean", "last"]
POOLINGS = get_args(Pooling)


@torch.no_grad()
def pool_activations(
    dictionary: FeatureDictionary,
    hidden: Tensor,
    counted: Tensor,
    pooling: Pooling,
    features: Tensor | None = None,
) -> Tensor:
    """Feature activations pooled over the counted tokens of each row.

    Args:
        dictionary: on the device of `hidden`.
        hidden: [rows, tokens, d_model] at its hook point.
        counted: [rows, tokens], bool: which tokens are the response's.
        pooling: "max", "mean" or "last".
        features: [k]; all features by default.

    Returns:
        [rows, k or d_sae] float32 on the device of `hidden`; NaN in a row of no counted token.

    Raises:
        AuditError: a score that is not finite.
    """
    if pooling == "last":
        counted = counted & (counted.cumsum(1) == counted.sum(1, keepdim=True))
    counts = counted.sum(1)
    rows = counted.nonzero()[:, 0]
    tokens = hidden[counted]
    result = torch.full(
        (len(hidden), dictionary.d_sae if features is None else len(features)),
        -torch.inf if pooling == "max" else 0.0,
        dtype=torch.float32,
        device=hidden.device,
    )
    width = dictionary.tokens_at_once
    for part, of_row in zip(tokens.split(width), rows.split(width), strict=True):
        activations = dictionary.encode(part)
        if features is not None:
            activations = activations[:, features.to(hidden.device)]
        if pooling == "max":
            index = of_row[:, None].expand_as(activations)
            result.scatter_reduce_(0, index, activations, "amax")
        else:
            belongs = of_row[None, :] == torch.arange(len(hidden), device=hidden.device)[:, None]
            result += belongs.to(activations.dtype) @ activations
    if pooling == "mean":
        result /= counts[:, None]
    if not bool(result[counts > 0].isfinite().all()):
        raise AuditError(
            "A feature score is not finite: the scorer's model overflowed. Load it in bfloat16 or float32."
        )
    result[counts == 0] = torch.nan
    return result
