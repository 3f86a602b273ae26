"""Disks that are full or read-only."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from helpers.scenarios.trainings import At, Bench, Result, check_readable, wait
from trl_sae_audit import RunRecord


@contextlib.contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size, mounted at `directory`; needs root."""
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        while directory.is_mount():  # once more if it is still protected
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> None:
    """Write until nothing more fits."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def protect(disk: Path) -> None:
    """Make it read-only, whatever is open on it."""
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)


def release(disk: Path) -> None:
    """Undo `protect`."""
    subprocess.run(["umount", str(disk)], check=True)


def disks(bench: Bench) -> Iterator[Result]:
    """The disk of the record is full, or read-only, for some steps or until the end; the disk of the checkpoints is full."""
    troubles: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
        "full": (fill, lambda disk: (disk / "filler").unlink()),
        "read-only": (protect, release),
    }
    for name, (begins, ends) in troubles.items():
        for over in (True, False):
            directory = bench.root / f"{name}-{over}"
            with small_disk(directory / "disk", 2) as disk:
                actions: dict[str, Callable[[], Any]] = {"step5": partial(begins, disk)}
                if over:
                    actions["step14"] = partial(ends, disk)
                record = disk / "record"
                code = wait(bench.start(directory, At(**actions), record=record))
                assert code == 0, bench.said(directory)
                assert "could not be written" in bench.said(directory)
                if over:
                    assert not bench.differences(directory, record)
                else:
                    assert not bench.different_weights(directory)
                    assert RunRecord.load(record).last_step == 4
            yield (
                f"disk of the record {name} from step 5 {'to 14' if over else 'on'}",
                1,
                "said once; training goes on to the same weights; "
                + (
                    "the record at the end has everything, bit for bit"
                    if over
                    else "the record stays readable, as it was after step 4"
                ),
            )
    directory = bench.root / "checkpoints-full"
    with small_disk(directory / "out", 8) as disk:
        code = wait(bench.start(directory, At(step7=lambda: fill(disk))))
        assert code == 1, code
        assert RunRecord.load(directory / "record").status == "failed"
        check_readable(directory / "record")
        (disk / "filler").unlink()
        assert wait(bench.start(directory)) == 0, bench.said(directory)
        assert not bench.differences(directory)
    yield (
        "disk of the checkpoints full at step 7",
        1,
        "the trainer ends the run with its own error; the record is 'failed' and readable; with room on the disk the run "
        "resumes to the same bits",
    )
