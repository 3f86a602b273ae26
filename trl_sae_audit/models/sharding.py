"""Whether the parameters of a model are spread over processes."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Sharded by torch's `fully_shard`, by transformers when it was loaded, or by hand."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
