"""One of several processes that dies."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from helpers.scenarios.trainings import At, Bench, Result, check_readable, fork, train, wait
from trl_sae_audit import RunRecord


def dead_rank(bench: Bench) -> Iterator[Result]:
    """One of two processes is killed at step 7, by turns the one that writes the record and the other."""
    for victim in (0, 1):
        directory = bench.root / f"rank-{victim}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def work(rank: int, directory: Path = directory, port: int = port, victim: int = victim) -> None:
            os.environ.update(
                {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            )
            actions = {"step7": lambda: os.kill(os.getpid(), signal.SIGKILL)} if rank == victim else {}
            train(directory, At(**actions), gradient_accumulation_steps=1)

        children = [fork(directory / f"rank{rank}", partial(work, rank)) for rank in (0, 1)]
        began = time.monotonic()
        codes = [wait(child, 120.0) for child in children]
        assert codes[victim] == -signal.SIGKILL, codes
        assert codes[1 - victim] == 1, codes
        record = RunRecord.load(directory / "record")
        check_readable(directory / "record")
        assert record.manifest["processes"] == 2
        assert record.last_step in (6, 7), record.last_step
        yield (
            f"process {victim} of two killed at step 7",
            1,
            f"the other ends with an error, {time.monotonic() - began:.0f} s after both started; the record is "
            f"'{record.status}', readable, and ends at step {record.last_step}",
        )
