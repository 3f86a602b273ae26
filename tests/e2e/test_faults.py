"""Preemption, disks and directories that fail, processes that die: what is left is whole, and training goes on.

The scenarios are those of `scripts/faults.py`, which does them more often and with real file systems; here are a few of
each, in real processes too.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.scenarios.directories import directories, two_runs
from helpers.scenarios.kills import begin, kills
from helpers.scenarios.processes import dead_rank
from helpers.scenarios.trainings import At, Bench, Result, last_checkpoint, wait
from transformers import TrainerCallback

from trl_sae_audit import RunRecord
from trl_sae_audit.io import atomic
from trl_sae_audit.record import resilient_writer as record_keeping

pytestmark = pytest.mark.newest


class DieAt(TrainerCallback):
    """Kills the process at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._die)

    def _die(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


def all_of(results: Iterator[Result]) -> int:
    """How often a fault was tried, each time with the result it must have."""
    return sum(times for _, times, _ in results)


def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(bench: Bench) -> None:
    assert all_of(kills(bench, 3, seed=1)) >= 3


def test_a_directory_that_is_removed_moved_or_replaced_does_not_end_the_training(bench: Bench) -> None:
    assert all_of(directories(bench)) == 3


def test_a_second_run_is_numbered_and_a_dead_ones_lock_is_no_hindrance(bench: Bench) -> None:
    assert all_of(two_runs(bench)) == 1


def test_a_process_that_dies_ends_the_others_and_the_record_stays_readable(bench: Bench) -> None:
    assert all_of(dead_rank(bench)) == 2


def refuse(path: Path, content: bytes) -> Path:
    """In place of `atomic.write_temporary`, on a full disk; `faults.py disks` fills a real one."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_takes_nothing_for_a_while_costs_nothing(bench: Bench) -> None:
    directory = bench.root / "refused"
    write = atomic.write_temporary
    actions = {
        f"step{step}": partial(setattr, atomic, "write_temporary", how)
        for step, how in ((5, refuse), (14, write))
    }
    assert wait(bench.start(directory, At(**actions), save_strategy="no")) == 0, bench.said(directory)
    assert not bench.differences(directory)
    said = bench.said(directory)
    assert said.count("could not be written at step 5 (No space left on device)") == 1
    assert "Training goes on" in said
    assert "is written again, up to step 14" in said


def test_a_record_that_cannot_be_written_for_too_long_is_given_up(bench: Bench) -> None:
    directory = bench.root / "given-up"

    def fill() -> None:
        record_keeping.MOST_WAITING = 20_000
        atomic.write_temporary = refuse

    callback = At(step5=fill)
    assert wait(bench.start(directory, callback, save_strategy="no")) == 0, bench.said(directory)
    assert "so the record is given up: it ends at step 4" in bench.said(directory)
    assert RunRecord.load(directory / "record").last_step == 4
    assert not bench.different_weights(directory)


def test_dying_between_the_trainers_part_of_a_checkpoint_and_ours(bench: Bench) -> None:
    directory = bench.root / "between"
    assert wait(bench.start(directory, DieAt("on_save", 6))) == -signal.SIGKILL
    state = directory / "out" / "checkpoint-6" / "sae_audit_0"
    shutil.rmtree(state)
    assert wait(bench.start(directory, DieAt("on_step_end", 8))) == -signal.SIGKILL
    assert (state / "manifest.json").exists(), (
        "the next resume from here must not depend on where the record ends"
    )
    assert RunRecord.load(directory / "record").last_step > 6
    assert wait(bench.start(directory)) == 0, bench.said(directory)
    assert not bench.differences(directory)


def test_killed_before_the_first_checkpoint_the_same_run_begins_anew_and_another_does_not(
    bench: Bench,
) -> None:
    directory = bench.root / "early"
    assert wait(bench.start(directory, DieAt("on_step_end", 2))) == -signal.SIGKILL
    assert RunRecord.load(directory / "record").last_step == 2
    assert wait(bench.start(directory, learning_rate=1e-4)) == 0
    assert "has the record of another run, so this run's record is in" in bench.said(directory)
    assert RunRecord.load(directory / "record-2").status == "finished"
    for checkpoint in (directory / "out").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert wait(bench.start(directory)) == 0, bench.said(directory)
    assert "killed before its first checkpoint: the record starts again" in bench.said(directory)
    assert not bench.differences(directory)


def test_killed_within_the_first_checkpoint_the_run_begins_anew_in_the_same_record(bench: Bench) -> None:
    directory = bench.root / "within"
    assert wait(bench.start(directory, DieAt("on_save", 3))) == -signal.SIGKILL
    (directory / "out" / "checkpoint-3" / "trainer_state.json").unlink()  # which the trainer writes last
    assert last_checkpoint(directory / "out") is None
    assert wait(bench.start(directory)) == 0, bench.said(directory)
    assert not (directory / "record-2").exists()
    assert not bench.differences(directory)


def test_sigterm_with_a_last_checkpoint(bench: Bench) -> None:
    """The trainer saves it in the midst of a step, and tells no callback."""
    directory = bench.root / "jit"
    child = begin(bench, directory, 0, jit=True)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert wait(child) == 0, bench.said(directory)
    assert not (directory / "weights").exists(), "the training was over before it was told to end"
    last = last_checkpoint(directory / "out")
    assert last is not None
    assert json.loads((Path(last) / "sae_audit_0" / "manifest.json").read_text())["step"] > 0
    assert wait(bench.start(directory, enable_jit_checkpoint=True)) == 0, bench.said(directory)
    assert not bench.differences(directory)
