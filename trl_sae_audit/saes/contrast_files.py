"""Directions of traits on disk: their matrix as safetensors, and a manifest with what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from ..io.atomic import write_durably
from ..io.manifest import (
    MANIFEST,
    StoredFile,
    check_free,
    fit,
    read_manifest,
    reading,
    stored_files,
    write_manifest,
)
from .contrast import ContrastDictionary, Separation

_FILE = "directions.safetensors"


@dataclass(frozen=True)
class _Content:
    name: str
    hook_point: str
    model_name: str | None
    separations: list[Separation]


def save_directions(
    dictionary: ContrastDictionary, directory: str | Path, config: dict[str, Any] | None = None
) -> None:
    """Write directions for `load_dictionary`, over earlier ones if there are any.

    Args:
        dictionary: from `contrast_directions`.
        directory: made if it does not exist.
        config: the options it was made with.

    Raises:
        AuditError: the directory holds something else.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        check_free(target, "directions")
    content = save({"directions": dictionary.decoder.cpu().contiguous()})
    write_durably(target / _FILE, content)
    body = _Content(
        dictionary.name, dictionary.hook_point, dictionary.model_name, list(dictionary.separations)
    )
    stored = [StoredFile.of(_FILE, content, dictionary.d_sae)]
    write_manifest(target, "directions", {"config": config or {}, **asdict(body)}, stored)


def holds_directions(directory: Path) -> bool:
    return (directory / _FILE).is_file() and (directory / MANIFEST).is_file()


def read_directions(directory: Path) -> ContrastDictionary:
    """What `save_directions` wrote.

    Raises:
        AuditError: damaged.
    """
    manifest = read_manifest(directory, "directions")
    with reading(directory / MANIFEST):
        if [each.file for each in stored_files(manifest)] != [_FILE]:
            raise ValueError(f"it names other files than {_FILE}")
        (stored,) = stored_files(manifest)
        content: _Content = fit(_Content, {name: manifest[name] for name in _Content.__dataclass_fields__})
    matrix = load(stored.read(directory))["directions"]
    dictionary = ContrastDictionary(matrix, content.hook_point, content.name, model_name=content.model_name)
    dictionary.separations = tuple(content.separations)
    return dictionary
