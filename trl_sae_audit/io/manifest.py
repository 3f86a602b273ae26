"""One format for everything this package writes: JSON with a `kind`, one version of the format, and how to make the thing again.

A directory has it as `manifest.json`; a single file, such as `outcomes.json`, is such a document itself. The keys:

- `kind`: one of `KINDS`.
- `format`: one version for all kinds. Another one is refused.
- `packages`: versions of the packages that made it.
- `config`: the options it was made with, enough to make it again. The name of one of its `files` means that file.
- `files`: name, length and CRC-32 of the files that the manifest vouches for, in an order that may mean something.
- what else the kind needs.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import AuditError
from .atomic import write_durably
from .untrusted import check_regular, is_inside, read_json

MANIFEST = "manifest.json"
FORMAT = 1
KINDS = {
    "run": "a run record",
    "audit": "an audit",
    "filtered": "filtered data",
    "sae": "a trained SAE",
    "directions": "directions of traits",
    "verification": "a verification",
    "shaped_reward": "a shaped reward",
    "callback_state": "a callback's state",
    "world": "a world of the lab",
    "outcomes": "outcomes",
    "evidence": "evidence",
    "labels": "labels",
    "calibration": "a calibration",
    "penalties": "coefficients of penalties",
}
"""What messages call each kind."""
_PACKAGES = (
    "trl-sae-audit", "torch", "transformers", "trl", "peft", "accelerate", "sae-lens", "datasets", "numpy", "pyarrow"
)  # fmt: skip


@dataclass(frozen=True)
class StoredFile:
    """A file that a manifest names: its path in the directory, with forward slashes, and what it must look like."""

    file: str
    size: int
    crc32: int
    rows: int = 0
    """Rows of a table; features of a file of totals."""

    @classmethod
    def of(cls, file: str, content: bytes, rows: int = 0) -> StoredFile:
        return cls(file, len(content), zlib.crc32(content), rows)

    @classmethod
    def on_disk(cls, directory: Path, file: str) -> StoredFile:
        """The same of a file that may be larger than memory."""
        size = crc = 0
        with (directory / file).open("rb") as opened:
            while block := opened.read(2**24):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return cls(file, size, crc)

    @classmethod
    def all_in(cls, directory: Path) -> list[StoredFile]:
        """All that are in a directory and below it."""
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return [cls.on_disk(directory, path.relative_to(directory).as_posix()) for path in files]

    def open(self, directory: Path) -> BinaryIO:
        """Open it; AuditError if there is no such file."""
        with reading(directory / self.file):
            check_regular(directory / self.file)
            return (directory / self.file).open("rb")

    def read(self, directory: Path) -> bytes:
        """Its content, checked."""
        with self.open(directory) as file:
            return self.read_from(directory, file)

    def read_from(self, directory: Path, file: BinaryIO) -> bytes:
        """The content of what `open` opened; an AuditError if it is not what was written."""
        size = os.fstat(file.fileno()).st_size
        # A manifest may claim any size: memory is allocated only for what the file has.
        content = file.read(size) if size == self.size else b""
        self._compare(directory, size, zlib.crc32(content))
        return content

    def check_on_disk(self, directory: Path) -> None:
        """The same without reading it into memory."""
        self.open(directory).close()
        actual = self.on_disk(directory, self.file)
        self._compare(directory, actual.size, actual.crc32)

    def _compare(self, directory: Path, size: int, crc32: int) -> None:
        if (size, crc32) != (self.size, self.crc32):
            problem = f"truncated or changed since its {self.size} bytes were written"
            raise damaged(directory / self.file, problem)


def document(kind: str, body: Mapping[str, Any], files: Iterable[StoredFile] = ()) -> bytes:
    """The bytes of a manifest, or of a file that is one."""
    content = {"kind": kind, "format": FORMAT, "packages": package_versions(), **body}
    if stored := [asdict(each) for each in files]:
        content["files"] = stored
    return json.dumps(content, indent=1).encode() + b"\n"


def write_manifest(
    directory: Path, kind: str, body: Mapping[str, Any], files: Iterable[StoredFile] = ()
) -> None:
    """Write `manifest.json`, the whole file or none of it, after the files that it names."""
    write_durably(directory / MANIFEST, document(kind, body, files))


def read_document(path: Path, *kinds: str, shape: Any = None) -> dict[str, Any]:
    """The content of a manifest, or of a file that is one; of one of `kinds`, and fitting `shape`, see `fit`.

    Raises:
        AuditError: no such file, something of another kind or format, or a damaged one.
    """
    where = path.parent if path.name == MANIFEST else path
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise AuditError(
            f"{where} is {_none_of(kinds)}, for there is no {path.name}; pass the directory of one."
        ) from None
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    check_kind(where, content, *kinds)
    with reading(path):
        stored_files(content)
        if shape is not None:
            fit(shape, content)
    return content


def read_manifest(directory: str | os.PathLike[str], *kinds: str, shape: Any = None) -> dict[str, Any]:
    """The manifest of a directory, see `read_document`; refused too if it names a file outside the directory."""
    content = read_document(Path(directory) / MANIFEST, *kinds, shape=shape)
    for stored in stored_files(content):
        if not is_inside(Path(directory), stored.file):
            raise AuditError(
                f"The manifest in {directory} names {stored.file!r}, outside of it; do not use it."
            )
    return content


def kind_of(directory: str | os.PathLike[str], *kinds: str) -> str:
    """Which of some kinds a directory holds; an AuditError if none of them."""
    return read_manifest(directory, *kinds)["kind"]


def stored_files(manifest: Mapping[str, Any]) -> list[StoredFile]:
    """The files that a manifest names, in its order."""
    return fit(list[StoredFile], manifest.get("files", []))


def check_kind(where: Path, content: Any, *kinds: str) -> None:
    """Refuse, with an AuditError, what is of none of some kinds, or of another format."""
    actual, version = (
        (content.get("kind"), content.get("format")) if isinstance(content, dict) else (None, None)
    )
    noun = KINDS.get(str(actual), "something else")
    if actual not in kinds:
        raise AuditError(f"{where} holds {noun}, {_none_of(kinds)}; pass the directory of one.")
    if version != FORMAT or isinstance(version, bool):
        raise AuditError(
            f"{where} holds {noun} of format {version!r}, and this trl-sae-audit reads format {FORMAT}; read it with the "
            "release that wrote it."
        )


def check_free(directory: Path, kind: str) -> None:
    """Refuse, with an AuditError, to write something of that kind over something else in an existing directory."""
    try:
        present = read_json(directory / MANIFEST)["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        present = None
    if present != kind:
        noun = KINDS.get(str(present), "something else")
        raise AuditError(f"{directory} holds {noun}, which is not overwritten; choose another directory.")


def _none_of(kinds: Iterable[str]) -> str:
    nouns = [KINDS[kind] for kind in kinds]
    return f"not {nouns[0]}" if len(nouns) == 1 else f"neither {' nor '.join(nouns)}"


def damaged(path: Path, error: Exception | str) -> AuditError:
    """The sentence for a file whose content is not what was written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return AuditError(
        f"{path} is damaged or cannot be read ({reason}); restore it from a copy, or make it again."
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever content of a wrong shape leads to, as the sentence that `path` is damaged."""
    try:
        yield
    except AuditError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        StopIteration,
        OverflowError,
    ) as error:
        raise damaged(path, error) from error


def fit(shape: Any, value: Any) -> Any:
    """JSON as the dataclass, or list or dict of such, that it should be; no type is taken for another.

    Raises:
        ValueError: it is none; the phrase says where.
    """
    from pydantic import TypeAdapter, ValidationError  # takes a while

    # halves of surrogate pairs, which UTF-8 does not have, become question marks
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    try:
        return TypeAdapter(shape).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ")
        raise ValueError(": ".join(filter(None, [".".join(map(str, first["loc"])), problem]))) from None


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy scalars as numbers, whatever JSON has no word for as its text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


@functools.cache
def package_versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that what is written depends on, without importing them."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
