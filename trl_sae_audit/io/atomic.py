"""Writing that survives a kill: a file is whole or absent, files that belong together change places together."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def temporary(path: Path) -> Path:
    """Where the content of `path` is written before it takes its name."""
    return path.with_name(path.name + ".tmp")


def write_temporary(path: Path, content: bytes) -> Path:
    """Write and sync `content` next to `path`; it counts once the result is renamed to `path`.

    Where that fails nothing is left: half a file would only take the place that is wanting. What lies there under the temporary
    name, a link that leads elsewhere say, is replaced and not written through.
    """
    try:
        temporary(path).unlink(missing_ok=True)
        with temporary(path).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            temporary(path).unlink(missing_ok=True)
        raise
    return temporary(path)


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that at any instant the whole of it is there, or what was there before."""
    write_temporary(path, content).replace(path)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Put files in place that belong together, all of them or none.

    Until all are written the old ones stay; while they change places the last one is absent, so that where it is
    present all are of one writing.
    """
    written: list[Path] = []
    try:
        for path, content in contents.items():
            written.append(write_temporary(path, content))
        list(contents)[-1].unlink(missing_ok=True)
        for path in contents:
            temporary(path).replace(path)
    except OSError:
        for path in written:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A scratch directory that takes the place of `path` when the block ends well; after an error nothing has changed."""
    scratch, old = (path.with_name(f".{path.name}.{os.getpid()}.{ending}") for ending in ("tmp", "old"))
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if path.exists():
            path.replace(old)
        try:
            scratch.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Make the names of a directory's files survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
