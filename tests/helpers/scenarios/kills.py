"""Preemption: trainings killed at any moment, and resumed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import trainer_jit_checkpoint as jit_checkpoint

from helpers.scenarios.trainings import (
    STEPS,
    At,
    Bench,
    Result,
    check_readable,
    fork,
    last_checkpoint,
    train,
    wait,
)

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
"""Events of Python's audit hooks between which a process can die with its files in another state."""


def die_at_operation(directory: Path, number: int) -> At:
    """A callback that kills its process at the `number`-th operation on a file below `directory` after step 1."""
    left = [number]
    armed = [False]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if armed[0] and event in OPERATIONS and str(arguments[0]).startswith(str(directory)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def arm() -> None:
        armed[0] = True

    sys.addaudithook(look)
    return At(**{f"step{step}": arm for step in range(1, STEPS)})


def evidence(directory: Path) -> str:
    """Where a process was when it died, by what it left."""
    if any((directory / "record").rglob("*.tmp")):
        return "while it wrote the record"
    checkpoints = sorted(
        (directory / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    if checkpoints:
        latest = checkpoints[-1]
        if last_checkpoint(directory / "out") != str(latest):
            return "while the trainer saved a checkpoint"
        if not (latest / "sae_audit_0" / "manifest.json").exists():
            return "between the trainer's part of a checkpoint and ours"
    return "elsewhere"


def kills(bench: Bench, times: int, seed: int = 0) -> Iterator[Result]:
    """`times` deaths: SIGKILL and SIGTERM from outside at random moments, and SIGKILL at a random file operation.

    Every third training has `enable_jit_checkpoint`: SIGTERM makes it save a checkpoint and end.
    """
    rng = random.Random(seed)
    happened: Counter[str] = Counter()
    places: Counter[str] = Counter()
    trainings = 0
    while happened.total() < times:
        directory = bench.root / f"killed-{trainings}"
        jit = trainings % 3 == 2
        trainings += 1
        last = happened.total() + rng.randint(1, 10)
        while True:
            number = rng.choice((0, rng.randint(1, 250))) if happened.total() < min(times, last) else -1
            child = begin(bench, directory, number, jit)
            if number == 0:
                time.sleep(rng.uniform(0.0, 1.0))
                os.kill(child, rng.choice((signal.SIGTERM, signal.SIGKILL)))
            code = wait(child)
            if code in (-signal.SIGKILL, -signal.SIGTERM):
                happened[signal.Signals(-code).name] += 1
                places[evidence(directory)] += 1
                check_readable(directory / "record")
                continue
            assert code == 0, bench.said(directory)
            if (directory / "weights").exists():
                break
            happened["SIGTERM with a last checkpoint"] += 1
        differences = bench.differences(directory)
        assert not differences, (directory, differences)
        shutil.rmtree(directory)
        print(f"{happened.total()} deaths in {trainings} trainings", file=sys.stderr, flush=True)
    how = ", ".join(f"{count} {name}" for name, count in sorted(happened.items()))
    where = ", ".join(f"{count} {name}" for name, count in places.most_common())
    yield (
        f"killed at random moments and resumed ({how}; died {where})",
        happened.total(),
        f"{trainings} trainings, killed up to ten times each and resumed to their end: totals, curriculum, every row and the weights are those of one "
        "never stopped, bit for bit; the record readable after every death",
    )


def begin(bench: Bench, directory: Path, number: int, jit: bool) -> int:
    """Start or resume a training, to die at its `number`-th operation on files if that is above 0; wait until it trains."""
    sign = directory / "trains"
    sign.unlink(missing_ok=True)

    def work() -> None:
        jit_checkpoint.CheckpointManager.__init__.__defaults__ = (0,)  # no grace period
        deadly = [die_at_operation(directory, number)] if number > 0 else []
        signs = At(**{f"step{step}": sign.touch for step in range(1, STEPS + 1)})
        train(directory, signs, *deadly, enable_jit_checkpoint=jit)

    child = fork(directory, work)
    while not sign.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    return child
