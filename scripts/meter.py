"""A meter of peak memory and processor time, which needs nothing installed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def memory() -> dict[str, float]:
    """Resident MiB: of the process's own, and of mapped files."""
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    return {
        name: int(lines[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))
    }


class Stages:
    """Peak memory and processor time of one thing after another."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._start = memory()["own"]
        self._peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, memory()["own"])
            time.sleep(0.002)

    @contextmanager
    def stage(self, name: str, times: int = 1) -> Iterator[None]:
        started = time.process_time()
        self._peak = memory()["own"]
        yield
        seconds = (time.process_time() - started) / times
        after = memory()
        self.rows.append(
            {
                "stage": name,
                "own": max(self._peak, after["own"]) - self._start,
                "kept": after["own"] - self._start,
                "mapped": after["mapped"],
                "seconds": seconds,
            }
        )
