"""What passes between processes in a training, and who asked for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "gather", "scatter", "all_gather", "all_gather_into_tensor"),
    *(
        "reduce_scatter",
        "reduce_scatter_tensor",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "send",
        "recv",
    ),
    *(
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
        "monitored_barrier",
    ),
)


class OwnCollectives:
    """What the package itself sends between processes while this is on: a (name, shape) each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...] | None]] = []

    def __enter__(self) -> OwnCollectives:
        self._originals = {name: vars(torch.distributed)[name] for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(torch.distributed, name, self._counted(name, original))
        return self

    def __exit__(self, *error: Any) -> None:
        for name, original in self._originals.items():
            setattr(torch.distributed, name, original)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            if _asked_by_the_package():
                shape = tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else None
                self.calls.append((name, shape))
            return original(*args, **kwargs)

        return collective


def _asked_by_the_package() -> bool:
    """Whether the innermost frame that is neither torch's nor accelerate's is of the package."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "accelerate.", __name__)):
            return module.startswith("trl_sae_audit.")
        frame = frame.f_back
    return False
