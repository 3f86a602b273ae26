"""Clocks that jump."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.scenarios.trainings import At, Bench, Result, last_checkpoint, train

SCRIPT = Path(__file__).parents[3] / "scripts" / "faults.py"
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def clock(bench: Bench) -> Iterator[Result]:
    """The computer's clock jumps ten years forward and twenty back, several times (libfaketime, in a new process)."""
    if not FAKETIME.is_file():
        raise SystemExit(f"There is no {FAKETIME}; install it (Debian: apt-get install libfaketime).")
    directory = bench.root / "clock"
    directory.mkdir()
    (directory / "now").write_text("+0")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(directory / "now"),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    for _ in range(2):  # the second is resumed
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "under-jumping-clock", "--directory", str(directory)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    years = json.loads((directory / "years").read_text())
    assert max(years) - min(years) > 25, years
    assert not bench.differences(directory)
    yield (
        f"the clock jumps between {min(years)} and {max(years)}, with a kill and a resume",
        1,
        "totals, curriculum, rows and weights are those of an undisturbed run, bit for bit",
    )


def train_under_jumping_clock(directory: Path) -> None:
    """What `clock` starts: dies at its 11th step when it is started first."""
    years: list[int] = []

    def jump(offset: str) -> Callable[[], None]:
        def act() -> None:
            (directory / "now").write_text(offset)
            years.append(time.gmtime().tm_year)
            (directory / "years").write_text(json.dumps(years))

        return act

    actions = {"step3": jump("+10y"), "step5": jump("-20y"), "step8": jump("+0"), "step9": jump("-20y")}
    if last_checkpoint(directory / "out") is None:
        actions["step11"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    else:
        actions = {"step10": jump("-20y"), "step13": jump("+10y"), "step20": jump("-20y")}
    train(directory, At(**actions))
