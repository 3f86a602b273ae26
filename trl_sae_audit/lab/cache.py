"""Where built worlds are kept, and how a damaged one is noticed."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ..untrusted import is_inside, read_json
from ..visible_text import visible

CHECKSUMS = "checksums.json"
"""The file of a world's directory that holds the others' SHA-256; written last."""

SOURCES = (
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
"""The libraries whose versions are part of it."""


def cache_root() -> Path:
    """The directory that holds all built worlds.

    `$TRL_SAE_AUDIT_CACHE` if set, else `trl-sae-audit` under `$XDG_CACHE_HOME` or `~/.cache`.
    """
    if chosen := os.environ.get("TRL_SAE_AUDIT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "trl-sae-audit"


def cache_key(config: dict) -> str:
    """Name of the directory of a world: a hash of its configuration, of the code and of the libraries."""
    here = Path(__file__).parent
    identity = {
        "config": config,
        "code": [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in SOURCES],
        "libraries": [version(name) for name in LIBRARIES],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def damage(directory: Path) -> str | None:
    """What is wrong with a world's files, as the end of a sentence; None if they are as they were written."""
    checksums = directory / CHECKSUMS
    if not checksums.is_file():
        return f"has no {CHECKSUMS}"
    try:
        expected = read_json(checksums)
    except (OSError, ValueError):
        return f"has an unreadable {CHECKSUMS}"
    if not isinstance(expected, dict) or not expected:
        return f"has an unreadable {CHECKSUMS}"
    for name, digest in expected.items():
        if not is_inside(directory, name):
            return f"has a {CHECKSUMS} that names {visible(name)}, which is not in it"
        path = directory / name
        if not path.is_file():
            return f"lacks {name}"
        if _digest(path) != digest:
            return f"has a changed {name}"
    return None


def cached(directory: Path, build: Callable[[Path], None]) -> Path:
    """Return `directory`, built first if it is missing or damaged.

    Several processes may ask at once: one builds, the others wait. The directory appears with all its files or
    not at all.

    Args:
        directory: Where the files shall be.
        build: Writes them into the empty directory it is given.

    Warns:
        UserWarning: What was found is damaged and is built anew.
    """
    from filelock import FileLock

    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if directory.exists():
            found = damage(directory)
            if found is None:
                return directory
            warnings.warn(
                f"The cached lab world {directory} {found}, so it is not used: building it anew.",
                stacklevel=3,
            )
            shutil.rmtree(directory)
        scratch = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
        try:
            build(scratch)
            files = sorted(path for path in scratch.rglob("*") if path.is_file())
            checksums = {path.relative_to(scratch).as_posix(): _digest(path) for path in files}
            (scratch / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
            scratch.replace(directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
