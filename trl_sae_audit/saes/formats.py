"""SAEs in the files of other libraries: recognised by those files, and read without running anything in them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import AuditError
from ..io.untrusted import check_regular, read_json
from . import format_readers as readers
from .pickles import is_pickle, pickle_error, safe_file
from .sae_files import Parts, SaeFiles, Weights

_DAMAGED = (
    KeyError, TypeError, ValueError, IndexError, OSError, RuntimeError, OverflowError, MemoryError, EOFError, AttributeError,
    SyntaxError, SafetensorError, BadZipFile, zlib.error,
)  # fmt: skip
"""What safetensors, numpy, zipfile and torch raise for a file that is not what it says."""


@dataclass(frozen=True)
class Format:
    """How the files of one kind are recognised.

    Attributes:
        weights: the file with the tensors, as a pattern below the folder. config: the JSON file, "" for none.
        tensors: names that are among those of the tensors.
        read: what makes an SAE of them.
    """

    name: str
    weights: str
    config: str
    tensors: tuple[str, ...]
    read: Callable[[SaeFiles], Parts]


def read_foreign(place: Path, converter: str | None = None) -> Parts | None:
    """The SAE in a folder or a file; None if the files are of no format known here.

    Args:
        place: a folder, or one file in it (`layer12.sae.safetensors`).
        converter: the name of a format in FORMATS; by default the files tell.

    Raises:
        AuditError: a pickle, damaged files, or an SAE that does not say what it needs.
    """
    if converter is not None and converter not in FORMATS:
        raise AuditError(
            f"converter is {converter!r}; choose one of {', '.join(FORMATS)}, or omit it: the files tell."
        )
    try:
        for known in FORMATS.values() if converter is None else (FORMATS[converter],):
            files = _files_of(place, known)
            if files is not None:
                return known.read(files)
    except _DAMAGED as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise AuditError(f"The SAE in {place} is damaged or incomplete: {reason}") from error
    folder = place if place.is_dir() else place.parent
    pickled = [path for path in ([place] if place.is_file() else sorted(folder.glob("*"))) if is_pickle(path)]
    if pickled:
        raise pickle_error(pickled[0], f"The SAE {str(place)!r}")
    if converter is not None:
        known = FORMATS[converter]
        raise AuditError(
            f"{str(place)!r} has no {' and '.join(filter(None, (known.weights, known.config)))} with "
            f"{', '.join(known.tensors)}, as an SAE of {converter} has; omit converter: the files tell."
        )
    return None


def _files_of(place: Path, known: Format) -> SaeFiles | None:
    folder = place if place.is_dir() else place.parent
    if place.is_dir():
        found = sorted(folder.glob(known.weights))
    else:
        named = safe_file(place) if is_pickle(place) else place
        found = [named] if named.is_file() and named.match(known.weights) else []
    configs = [folder / name for name in known.config.split("|") if (folder / name).is_file()]
    if len(found) != 1 or (known.config and not configs):
        return None
    check_regular(found[0])
    names = _tensor_names(found[0])
    if not set(known.tensors) <= names:
        return None
    config = read_json(configs[0]) if known.config else {}
    if not isinstance(config, dict):
        raise ValueError(f"{configs[0].name} is not a configuration")
    return SaeFiles(place.absolute(), _read_tensors(found[0]), config)


def _tensor_names(path: Path) -> set[str]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return set(arrays.files)
    with safe_open(path, framework="pt") as tensors:
        return set(tensors.keys())


def _read_tensors(path: Path) -> Weights:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


_LINEAR = ("encoder.weight", "decoder.weight")
FORMATS = {
    known.name: known
    for known in (
        Format("gemma_scope", "params.npz", "", ("threshold",), readers.read_gemma_scope),
        Format(
            "gemma_scope_2",
            "params.safetensors",
            "config.json",
            ("w_enc", "w_dec"),
            readers.read_gemma_scope_2,
        ),
        Format(
            "llama_scope",
            "checkpoints/final.safetensors",
            "hyperparams.json|hyperparameters.json",
            _LINEAR,
            readers.read_llama_scope,
        ),
        Format(
            "llama_scope_r1_distill",
            "sae_weights.safetensors",
            "config.json",
            (*_LINEAR, "log_jumprelu_threshold"),
            readers.read_llama_scope_r1,
        ),
        Format("sparsify", "sae.safetensors", "cfg.json", ("encoder.weight", "W_dec"), readers.read_sparsify),
        Format("dictionary_learning", "ae.safetensors", "config.json", (), readers.read_dictionary_learning),
        Format("qwen_scope", "layer*.sae.safetensors", "", ("W_enc", "W_dec"), readers.read_qwen_scope),
        Format("deepseek_r1", "*-SAE-l*.safetensors", "", _LINEAR, readers.read_deepseek_r1),
        Format(
            "goodfire",
            "*.safetensors",
            "",
            ("encoder_linear.weight", "decoder_linear.weight"),
            readers.read_goodfire,
        ),
    )
}
"""The formats that are read, besides sae-lens' own."""
