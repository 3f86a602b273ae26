"""Trainings to be disturbed, each in a process of its own, and what they are compared with."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from helpers.trainers import arguments
from helpers.worlds import make_dictionary, make_model, make_tokenizer, pairs
from trl_sae_audit import FeatureAttributionCallback, RunRecord

Result = tuple[str, int, str]
"""What was done, how often, and what came of it."""

STEPS = 24


class At(TrainerCallback):
    """Does something when a training reaches a step."""

    def __init__(self, **actions: Callable[[], Any]) -> None:
        self.actions = {int(step.removeprefix("step")): action for step, action in actions.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.actions:
            self.actions[state.global_step]()


def train(directory: Path, *callbacks: TrainerCallback, record: Path | None = None, **overrides: Any) -> None:
    """One training in `directory`, resumed from its last whole checkpoint; its weights at the end go to `weights`."""
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 2,
        "gradient_checkpointing": False,
        "log_level": "error",
    }
    trainer = DPOTrainer(
        make_model(tokenizer),
        make_model(tokenizer),
        args=DPOConfig(**arguments(directory, **settings | overrides)),
        train_dataset=pairs(24),
        processing_class=tokenizer,
        callbacks=[
            FeatureAttributionCallback(
                make_dictionary(),
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
    """Where faults are tried: a directory, and what an undisturbed training left in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.whole = root / "whole"
        assert wait(self.start(self.whole)) == 0, self.said(self.whole)

    def start(self, directory: Path, *callbacks: TrainerCallback, **arguments: Any) -> int:
        return fork(directory, lambda: train(directory, *callbacks, **arguments))

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


def check_readable(record: Path) -> None:
    """The record, if there is one yet, loads, and its rows end where its totals do."""
    if (record / "manifest.json").exists():
        loaded = RunRecord.load(record)
        if loaded.last_step:
            assert loaded.steps()["step"].max() == loaded.last_step == loaded.totals().steps
