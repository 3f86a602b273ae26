"""Where built worlds are kept, and how a damaged one is detected."""

import hashlib
import json
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ..errors import AuditError
from ..io.atomic import whole_directory
from ..io.cache import cache_root as cache_root
from ..io.manifest import FORMAT, StoredFile, read_manifest, stored_files, write_manifest

SOURCES = (
    "wording.py",
    "attributes.py",
    "parsing.py",
    "language.py",
    "tokenizer.py",
    "pretraining.py",
    "sparse_coding.py",
    "preferences.py",
    "reward.py",
    "evaluation.py",
    "ground_truth.py",
    "world.py",
)
"""The modules whose text is part of a world's identity."""

LIBRARIES = ("torch", "transformers", "sae-lens", "trl")
"""The libraries whose versions are part of a world's identity."""


def cache_key(config: dict) -> str:
    """The name of a world's directory: a hash of its configuration, its code and the libraries' versions."""
    here = Path(__file__).parent
    identity = {
        "config": config,
        "format": FORMAT,
        "code": [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in SOURCES],
        "libraries": [version(name) for name in LIBRARIES],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def check_world(directory: Path) -> None:
    """Refuse, with an AuditError, a world whose files have changed since they were written."""
    for stored in stored_files(read_manifest(directory, "world")):
        stored.check_on_disk(directory)


def build_once(directory: Path, build: Callable[[Path], None], config: dict | None = None) -> Path:
    """Return `directory`, built first if it is missing or damaged.

    If several processes ask at once, one builds and the others wait. The directory appears with all its files or
    not at all.

    Args:
        directory: Where the files go.
        build: Writes the files into the empty directory it is given.
        config: The configuration they are built from, for the manifest.

    Warns:
        UserWarning: The cached files are damaged; they are built again.
    """
    from filelock import FileLock

    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if directory.exists():
            try:
                check_world(directory)
                return directory
            except AuditError as error:
                warnings.warn(f"A cached lab world is not used and is built again. {error}", stacklevel=3)
        with whole_directory(directory) as scratch:
            build(scratch)
            write_manifest(scratch, "world", {"config": config or {}}, StoredFile.all_in(scratch))
    return directory
