"""Rows a few at a time, and how to know rows again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.opener import DatasetLike, Row, iterate_rows
from ..data.preferences import row_digest

_TOKENS, _MOST_TOKENS = 1024, 2**15


def chunks(dataset: DatasetLike, size: int) -> Iterator[list[Row]]:
    """The rows of a dataset, `size` at a time."""
    rows = iterate_rows(dataset)
    while chunk := list(islice(rows, size)):
        yield chunk


def digests(rows: Sequence[Row]) -> np.ndarray:
    """SHA-256 of what TRL reads of each row: [rows, 32] uint8."""
    return np.frombuffer(b"".join(row_digest(row) for row in rows), np.uint8).reshape(-1, 32)


def tokens_at_once(model: nn.Module) -> int:
    """How many tokens of padded rows a forward and backward pass is given: on a processor more are no faster; on a GPU as many as
    take half of the free memory, estimated as 17 numbers of the width a layer (Korthikanti et al. 2022)."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return _TOKENS
    config = next(
        part for part in model.modules() if isinstance(part, PreTrainedModel)
    ).config.get_text_config()
    size = next(model.parameters()).element_size()
    token = 17 * size * config.hidden_size * config.num_hidden_layers
    return max(_TOKENS, min(_MOST_TOKENS, torch.cuda.mem_get_info(device)[0] // 2 // token))
