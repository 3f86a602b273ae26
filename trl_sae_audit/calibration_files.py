"""A scorer's calibration on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .errors import AuditError
from .record_files import write_durably
from .untrusted_tables import checksum_of, read_arrays


def write_calibration(path: Path, state: Mapping[str, Any]) -> None:
    """A scorer's `state_dict` as safetensors."""
    tensors = {name: state[name] for name in ("mean", "deviation") if state[name] is not None}
    header = {name: str(state[name]) for name in ("identity", "pooling", "calibration_size")}
    header["crc32"] = str(_checksum(tensors, header))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, safetensors_bytes(tensors, metadata=header))
    except OSError as error:
        raise AuditError(
            f"The calibration cannot be written to {path} ({error.strerror}); choose another path."
        ) from error


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> int:
    return checksum_of({name: tensor.cpu().numpy() for name, tensor in tensors.items()}, header)


def read_calibration(path: Path) -> dict[str, Any]:
    """What `write_calibration` wrote.

    Raises:
        AuditError: missing or damaged.
    """
    try:
        arrays, header = read_arrays(path)
        state: dict[str, Any] = {name: header[name] for name in ("identity", "pooling")}
        state["calibration_size"] = int(header["calibration_size"])
        for name in ("mean", "deviation"):
            state[name] = torch.from_numpy(arrays[name]) if arrays else None
        if header.pop("crc32", None) not in (None, str(checksum_of(arrays, header))):
            raise ValueError("its checksum is not that of its content")
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
