"""What of torch's state in the process decides what is computed, which a notebook may have set for all its cells."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """Graphs can be made, and models run in their own type: not in `torch.inference_mode`, and without autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
