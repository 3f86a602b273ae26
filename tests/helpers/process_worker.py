"""Trainings in one and in several processes, on the same examples; leaves what every process saw and kept.

    python process_worker.py DIRECTORY PLAN…

A plan is CASES:PROCESSES or CASES:PROCESSES:ENGINE, with CASES separated by commas. The libraries are imported once and the
processes forked from there; started by torchrun, this is one of the processes itself and PLAN has its cases only. What
is trained, on which engine, and what is seen of it, is in the modules of worker/.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.worker import preferences, sampling, scoring
from helpers.worker.engines import ENGINES
from helpers.worker.settings import SETTINGS

CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    case.__name__: case
    for case in [
        *(preferences.dpo, preferences.dpo_logged, preferences.dpo_without, preferences.dpo_loaded),
        *(preferences.dpo_generating, preferences.dpo_generating_far, preferences.dpo_worded),
        *(preferences.dpo_windows, preferences.sft_short, preferences.kto),
        *(sampling.grpo, sampling.grpo_sampled, sampling.grpo_one_sided, sampling.ppo),
        scoring.scorer,
    ]
}


def one_process(rank: int, directory: Path, cases: list[str], processes: int, engine: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        if engine:
            ENGINES[engine]()
        leave(directory / f"{engine or 'ddp'}{processes}", cases, rank)
    except BaseException:
        traceback.print_exc()
        raise


def leave(directory: Path, cases: list[str], rank: int) -> None:
    if torch.cuda.is_available():
        SETTINGS["use_cpu"] = False
    for name in cases:
        (directory / name).mkdir(parents=True, exist_ok=True)
        torch.save(CASES[name](directory / name), directory / name / f"rank{rank}.pt")


def main(directory: Path, plans: list[str]) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave(directory, plans, int(os.environ["RANK"]))
        return
    if any("zero" in plan for plan in plans):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401, once for all processes
    import trl  # noqa: F401, likewise

    for plan in plans:
        cases, processes, engine = (plan + ":").split(":")[:3]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(
            one_process,
            (directory, cases.split(","), int(processes), engine, port),
            int(processes),
            start_method="fork",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
