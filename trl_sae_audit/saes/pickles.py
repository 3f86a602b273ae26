"""SAEs published as pickles: refused, with the command that makes a safe file of one."""

from __future__ import annotations

from pathlib import Path

from ..errors import AuditError

PICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def is_pickle(path: Path) -> bool:
    return path.suffix in PICKLED


def safe_file(path: Path) -> Path:
    """Where the converted form of a pickle is looked for: the same name, ending in .safetensors."""
    return path.with_suffix(".safetensors")


def pickle_error(path: Path, what: str, fetch: str = "") -> AuditError:
    """The sentence about a pickle, with the command that converts it once.

    Args:
        path: the file.
        what: how the user named the SAE.
        fetch: the command that fetches the file and prints its path, where the file is not here yet.
    """
    here = f"PATH{path.suffix}" if fetch else str(path)
    command = (
        f"python -c \"import torch, safetensors.torch as s; w = torch.load('{here}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in w.items()}}, '{safe_file(Path(here))}')\""
    )
    first = f"fetch it with `{fetch}`, which prints where it is (PATH{path.suffix}), and " if fetch else ""
    return AuditError(
        f"{what} is published as a pickle ({path.name}), which can run code when it is read, so it is not read here. If you "
        f"trust its author, {first}convert it once with `{command}`; then load it again in the same way."
    )
