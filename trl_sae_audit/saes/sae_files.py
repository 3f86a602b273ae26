"""An SAE's files as they were read, and what sae-lens makes an SAE of."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AuditError

Weights = dict[str, Tensor]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """An SAE as sae-lens makes one: its configuration, with `metadata`, and its state."""

    config: Settings
    state: Weights


@dataclass(frozen=True)
class SaeFiles:
    """The files of one SAE.

    Attributes:
        place: as given, where a path often says what the files do not: the layer, the model, how many features are active.
        weights: tensors by name.
        config: of the JSON file beside them; empty where there is none.
    """

    place: Path
    weights: Weights
    config: Mapping[str, Any]

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in the path; None if it is not in there."""
        match = re.search(pattern, self.place.as_posix())
        return match[1] if match else None

    def require(self, pattern: str, what: str) -> str:
        found = self.find(pattern)
        if found is None:
            raise AuditError(
                f"The files of the SAE {str(self.place)!r} do not say {what}, which the name of their folder does where they "
                "were published; keep that name."
            )
        return found


def make_parts(
    architecture: str, state: Weights, metadata: Mapping[str, Any], *, subtracts_b_dec: bool, **own: Any
) -> Parts:
    """An SAE on the plain residual stream; the state has W_enc [d_model, d_sae] and W_dec [d_sae, d_model]."""
    widest = functools.reduce(torch.promote_types, (value.dtype for value in state.values()))
    state = {name: value.to(widest).contiguous() for name, value in state.items()}
    d_sae, d_in = state["W_dec"].shape
    if state["W_enc"].shape != (d_in, d_sae) or state["b_dec"].shape != (d_in,):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in state.items())
        raise ValueError(f"its shapes contradict each other ({shapes})")
    if not widest.is_floating_point:
        raise ValueError(f"its numbers are {widest}")
    k = own.get("k", 1)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= d_sae:
        raise ValueError(f"it says that {k!r} of its {d_sae} features are active")
    settings = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": str(state["W_dec"].dtype).removeprefix("torch."),
        "apply_b_dec_to_input": subtracts_b_dec,
        "normalize_activations": "none",
        "metadata": dict(metadata),
        **own,
    }
    return Parts(settings, state)
