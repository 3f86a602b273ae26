"""The directory of a run record: made or refused, and locked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AuditError
from ..io import atomic
from ..io.manifest import MANIFEST
from .lock import LOCK, DirectoryLock, unusable


@contextmanager
def lock_directory(directory: Path) -> Iterator[DirectoryLock]:
    """A lock that outlives the block only if the block succeeds."""
    lock = DirectoryLock(directory)
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


def prepare_directory(directory: Path) -> None:
    """Make the directory, or refuse one that is neither empty nor a record.

    A creation that was killed before its manifest leaves at most a lock and a temporary manifest.
    """
    if directory.exists() and not directory.is_dir():
        raise AuditError(
            f"{directory} is a file, but a run record is a directory: choose another output_dir."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise unusable(directory, error) from error
    foreign = sorted(present - {LOCK, atomic.temporary(Path(MANIFEST)).name})
    if foreign and MANIFEST not in present:
        raise AuditError(
            f"{directory} is not empty and holds no run record (it has {foreign[0]!r}): choose a new or empty "
            f"output_dir, for example {directory / 'audit'}."
        )
