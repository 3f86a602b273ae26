"""A scorer's calibration on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt

from ..errors import AuditError
from ..io.atomic import write_durably
from ..io.manifest import FORMAT, check_kind, fit
from ..io.tables import load_checked, save_checked


@dataclass(frozen=True)
class _Description:
    identity: str
    pooling: str
    attention_sinks: bool
    calibration_size: NonNegativeInt


def write_calibration(path: Path, state: Mapping[str, Any]) -> None:
    """A scorer's `state_dict` as safetensors."""
    about = {name: state[name] for name in ("identity", "pooling", "attention_sinks", "calibration_size")}
    arrays = {name: state[name].cpu().numpy() for name in ("mean", "deviation") if state[name] is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, save_checked(arrays, {"kind": "calibration", "format": FORMAT, **about}))
    except OSError as error:
        raise AuditError(
            f"The calibration cannot be written to {path} ({error.strerror}); choose another path."
        ) from error


def read_calibration(path: Path) -> dict[str, Any]:
    """What `write_calibration` wrote.

    Raises:
        AuditError: missing or damaged.
    """
    try:
        arrays, about = load_checked(path)
        check_kind(path, about, "calibration")
        fit(_Description, about)
        state = about | {
            name: torch.from_numpy(arrays[name]) if arrays else None for name in ("mean", "deviation")
        }
        if arrays:
            _check_calibration(state)
    except (OSError, ValueError, KeyError) as error:
        raise AuditError(
            f"{path} is not a calibration that can be read ({error}); calibrate again."
        ) from error
    return state


def _check_calibration(state: Mapping[str, Any]) -> None:
    for name in ("mean", "deviation"):
        values = state[name]
        if values.dtype != torch.float32 or values.ndim != 1 or not bool(values.isfinite().all()):
            raise ValueError(f"{name!r} is {values.dtype} {tuple(values.shape)} or not finite")
    if state["mean"].shape != state["deviation"].shape or bool((state["deviation"] < 0).any()):
        raise ValueError("its deviations do not go with its means")
    if state["calibration_size"] < 2:
        raise ValueError(f"it was made from {state['calibration_size']} responses")
