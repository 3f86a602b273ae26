"""Directories that vanish, are replaced, or are wanted by two runs."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

from helpers.scenarios.kills import begin
from helpers.scenarios.trainings import At, Bench, Result, wait
from trl_sae_audit import RunRecord


def directories(bench: Bench) -> Iterator[Result]:
    """The record's directory is removed, moved away and back, or replaced by that of another run, under way."""
    directory = bench.root / "removed"
    record = directory / "record"
    assert wait(bench.start(directory, At(step5=lambda: shutil.rmtree(record)))) == 0, bench.said(directory)
    assert "was removed" in bench.said(directory)
    assert not record.exists()
    assert not bench.different_weights(directory)
    yield "directory of the record removed at step 5", 1, "said once; training goes on to the same weights"

    directory = bench.root / "moved"
    record, away = directory / "record", directory / "away"
    actions = {"step5": lambda: record.rename(away), "step14": lambda: away.rename(record)}
    assert wait(bench.start(directory, At(**actions))) == 0, bench.said(directory)
    assert not bench.differences(directory)
    yield (
        "directory of the record moved away at step 5, back at 14",
        1,
        "said once; the record at the end has everything, bit for bit",
    )

    directory = bench.root / "replaced"
    record = directory / "record"

    def replace() -> None:
        shutil.rmtree(record)
        shutil.copytree(bench.whole / "record", record)

    assert wait(bench.start(directory, At(step5=replace))) == 0, bench.said(directory)
    assert "was replaced" in bench.said(directory)
    assert not bench.differences(directory), "the other run's record was touched"
    yield (
        "directory of the record replaced by another run's at step 5",
        1,
        "said once; the other record is left alone; training goes on to the same weights",
    )


def two_runs(bench: Bench) -> Iterator[Result]:
    """A second run on the directory of one that trains; and a resumed one, after the first was killed."""
    directory = bench.root / "two"
    child = begin(bench, directory, 0, jit=False)
    os.kill(child, signal.SIGSTOP)
    try:
        second = bench.root / "second"
        assert wait(bench.start(second, record=directory / "record")) == 0, bench.said(second)
        assert f"this run's record is in {directory / 'record-2'}" in bench.said(second)
        assert RunRecord.load(directory / "record-2").status == "finished"
    finally:
        os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    assert wait(bench.start(directory)) == 0, bench.said(directory)
    assert not bench.differences(directory)
    yield (
        "a second run on the same record, the first then killed and resumed",
        1,
        "the second's record is numbered, and the log says so; the resumed one is not hindered by the dead one's lock, and "
        "ends with the same bits",
    )
