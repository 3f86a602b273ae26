"""One writer a directory, enforced by the kernel."""

import fcntl
import os
import weakref
from pathlib import Path

from ..errors import AuditError, DirectoryTakenError, RecordWriteError

LOCK = ".lock"


class DirectoryLock:
    """An advisory `flock` on a file in the directory, which the kernel drops when the process dies however it dies.

    A second lock is refused within one process too. A forked child (a data-loading worker) gives up its copy at
    once, so that it cannot outlive a killed parent and keep the directory locked.

    Raises:
        DirectoryTakenError: another writer holds the lock.
        AuditError: the directory cannot be written or locked.
    """

    def __init__(self, directory: Path):
        try:
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise unusable(directory, error) from error
        self._directory, self._descriptor = directory, descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise DirectoryTakenError(
                f"{directory} is being written by another writer that is still running: wait until it ends, or "
                "choose another output_dir."
            ) from None
        except OSError as error:
            self.release()
            raise AuditError(
                f"The file system of {directory} cannot lock a file ({error.strerror}): choose an output_dir on a "
                "local disk."
            ) from error
        _held.add(self)

    def check(self) -> None:
        """Refuse to continue if the directory is no longer the one that was locked.

        Raises:
            RecordWriteError: it was removed, moved away or replaced, and by now may be another writer's.
        """
        try:
            ours = os.path.samestat(os.fstat(self._descriptor), (self._directory / LOCK).stat())
        except OSError as error:
            raise RecordWriteError(
                f"{self._directory} was removed, moved or made unreadable while a run was writing to it "
                f"({error.strerror}): put it back.",
                "removed",
            ) from error
        if not ours:
            raise RecordWriteError(
                f"{self._directory} was replaced while a run was writing to it: what is there now is left alone.",
                "replaced",
            )

    @property
    def held(self) -> bool:
        """Whether this object still keeps others out."""
        return self._close.alive

    def release(self) -> None:
        """Let others write; harmless when repeated."""
        self._close()


_held: "weakref.WeakSet[DirectoryLock]" = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)


def unusable(directory: Path, error: OSError) -> AuditError:
    """The sentence for a directory that the operating system does not let us write to."""
    return AuditError(f"{directory} cannot be written ({error.strerror}): choose another output_dir.")
