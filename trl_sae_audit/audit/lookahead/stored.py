"""Tensors of the size of a model that are put aside on disk, and read back a parameter at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import AuditError


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by parameter in a file of the system's temporary directory, which goes with this object.

    Args:
        tensors: what to put aside; all on one device.

    Raises:
        AuditError: they cannot be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="sae-audit-")
        self._path = Path(self._directory.name) / "tensors.safetensors"
        self._device = next(iter(tensors.values())).device
        self._names = list(tensors)
        try:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, self._path)
        except (OSError, SafetensorError) as error:
            raise AuditError(
                f"The lookahead puts a gradient of the model's size aside in {tempfile.gettempdir()}, which could not be written "
                f"({error}); make room, or set TMPDIR to a directory that has it."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt", device=str(self._device)) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ComputedTensors(Mapping[str, Tensor]):
    """Tensors by parameter that are computed whenever they are asked for."""

    def __init__(self, names: Mapping[str, Tensor], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = list(names), compute

    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
