"""Kill, starve and disturb real trainings, and compare what they leave with a training that nothing happened to.

Every training is a process of its own, forked from this one, which has imported everything and trained nothing: a DPO
trainer on a tiny model, with the attribution callback, a checkpoint every few steps and a record written at every step.
Each fault prints one line: what was done, how often, and what came of it; the command fails if anything is not as it
must be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tiny import Parts, tiny_parts
from transformers import TrainerCallback
from transformers import trainer_jit_checkpoint as jit_checkpoint
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import FeatureAttributionCallback, RunRecord

Result = tuple[str, int, str]
"""What was done, how often, and what came of it."""

STEPS = 24
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
"""Events of Python's audit hooks between which a process can die with its files in another state."""


class At(TrainerCallback):
    """Does something when a training reaches a step."""

    def __init__(self, **actions: Callable[[], Any]) -> None:
        self.actions = {int(step.removeprefix("step")): action for step, action in actions.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.actions:
            self.actions[state.global_step]()


def make_parts() -> Parts:
    return tiny_parts(
        width=16, layers=2, features=64, hook_point="model.layers.0", words=60, pairs=24, length=(2, 6)
    )


def train(
    parts: Parts, directory: Path, *callbacks: TrainerCallback, record: Path | None = None, **arguments: Any
) -> None:
    """One training in `directory`, resumed from its last whole checkpoint; its weights at the end go to `weights`."""
    build, tokenizer, pairs, dictionary = parts
    settings: dict[str, Any] = {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "save_total_limit": 2,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
    }
    trainer = DPOTrainer(
        build(),
        build(),
        args=DPOConfig(**settings | arguments),
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=[
            FeatureAttributionCallback(
                dictionary,
                record or directory / "record",
                watch={"one": 1},
                examples=True,
                probe=["w1 w2 w3"],
                probe_steps=2,
                flush_seconds=0.0,
            ),
            *callbacks,
        ],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(directory / "out"))
    if trainer.accelerator.is_main_process and trainer.state.global_step == STEPS:
        weights = {name: value.contiguous() for name, value in trainer.model.state_dict().items()}
        save_file(weights, directory / "weights")


def last_checkpoint(output_dir: Path) -> str | None:
    """The latest checkpoint that the trainer finished, as a user who resumes would choose it."""
    whole = []
    for path in output_dir.glob("checkpoint-*"):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            json.loads((path / "trainer_state.json").read_text())
            whole.append(path)
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def fork(directory: Path, work: Callable[[], None]) -> int:
    """Start `work` in a child, whose words go to `directory/log`; give its id."""
    directory.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = (directory / "log").open("a", buffering=1)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        sys.stdout = sys.stderr = log
        logging.basicConfig(stream=log, force=True)
        work()
        code = 0
    finally:
        try:
            if code:
                traceback.print_exc(file=log)
            log.flush()
        finally:
            os._exit(code)


def wait(child: int, seconds: float = 300.0) -> int:
    """The child's exit code, negative if a signal ended it.

    Raises:
        TimeoutError: it still runs after `seconds`; it is killed.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} still ran after {seconds} seconds")


class Bench:
    """Where faults are tried: parts to train, a directory, and what an undisturbed training left in it."""

    def __init__(self, root: Path, parts: Parts) -> None:
        self.root, self.parts = root, parts
        self.whole = root / "whole"
        assert wait(self.start(self.whole)) == 0, self.said(self.whole)

    def start(self, directory: Path, *callbacks: TrainerCallback, **arguments: Any) -> int:
        return fork(directory, lambda: train(self.parts, directory, *callbacks, **arguments))

    def said(self, directory: Path) -> str:
        return (directory / "log").read_text(errors="replace")

    def differences(self, directory: Path, record: Path | None = None) -> list[str]:
        """What differs, in any bit, from the undisturbed training: totals, curriculum, rows, weights."""
        found, expected = (
            RunRecord.load(record or directory / "record"),
            RunRecord.load(self.whole / "record"),
        )
        differing = []
        if (found.status, found.last_step) != ("finished", STEPS):
            differing.append(f"ends {found.status} at step {found.last_step}")
        state = found.totals().state_dict()
        for name, values in expected.totals().state_dict().items():
            if state[name].tobytes() != np.asarray(values).tobytes():
                differing.append(name)
        for table in expected.tables:
            if not found.table(table).equals(expected.table(table)):
                differing.append(f"table {table}")
        return differing + self.different_weights(directory)

    def different_weights(self, directory: Path) -> list[str]:
        found, expected = load_file(directory / "weights"), load_file(self.whole / "weights")
        return [name for name, values in expected.items() if not torch.equal(found[name], values)]


# Preemption


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
        if not (latest / "sae_audit_0" / "state.json").exists():
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
        train(bench.parts, directory, signs, *deadly, enable_jit_checkpoint=jit)

    child = fork(directory, work)
    while not sign.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    return child


def check_readable(record: Path) -> None:
    """The record, if there is one yet, loads, and its rows end where its totals do."""
    if (record / "manifest.json").exists():
        loaded = RunRecord.load(record)
        if loaded.last_step:
            assert loaded.steps()["step"].max() == loaded.last_step == loaded.totals().steps


# Disks and directories


@contextlib.contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size, mounted at `directory`; needs root."""
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(directory)], check=True)


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
        code = wait(bench.start(second, record=directory / "record"))
        assert code == 1
        assert "is being written by another writer that is still running" in bench.said(second)
    finally:
        os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    assert wait(bench.start(directory)) == 0, bench.said(directory)
    assert not bench.differences(directory)
    yield (
        "a second run on the same record, the first then killed and resumed",
        1,
        "the second ends before its first step, with a sentence; the resumed one is not hindered by the dead one's lock, and "
        "ends with the same bits",
    )


# Processes and clocks


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
            train(bench.parts, directory, At(**actions), gradient_accumulation_steps=1)

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
            [sys.executable, __file__, "under-jumping-clock", "--directory", str(directory)],
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
    train(make_parts(), directory, At(**actions))


FAULTS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "disks": disks,
    "directories": directories,
    "two-runs": two_runs,
    "dead-rank": dead_rank,
    "clock": clock,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", nargs="+", choices=["kills", *FAULTS, "all", "under-jumping-clock"])
    parser.add_argument("--times", type=int, default=60, help="deaths in `kills`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of `kills`")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fault == ["under-jumping-clock"]:
        train_under_jumping_clock(options.directory)
        return
    faults: dict[str, Callable[[Bench], Iterator[Result]]] = {
        "kills": lambda bench: kills(bench, options.times, options.seed),
        **FAULTS,
    }
    chosen = list(faults) if "all" in options.fault else options.fault
    table = Table("what", "times", "result")
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root), make_parts())
        for name in chosen:
            for what, times, result in faults[name](bench):
                table.add_row(what, str(times), result)
                print(f"| {what} | {times} | {result} |", flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
