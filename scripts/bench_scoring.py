"""What scoring flagged features costs a GRPO or PPO step, generation included, on the lab's task.

    python scripts/bench_scoring.py --trainer grpo       # the newest TRL
    python scripts/bench_scoring.py --trainer ppo        # TRL 1.12, in the PPO environment

One shaped run. Of every step is measured how long all of it took and how long what shaping adds: reading the responses
with the frozen model, and the penalty. Reported is the median over steps of the second over the rest of the step, with a
bootstrap interval, in processor time and wall clock: paired step by step, so that other load on the machine hits both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from transformers import TrainerCallback

from trl_sae_audit import AdaptivePenalty, ShapedReward, ShapedRewardModel
from trl_sae_audit.shaping.shaper import Shaper

sys.path.append(str(Path(__file__).parent / "studies"))

import shaped_runs

CLOCKS: dict[str, Callable[[], float]] = {
    "processor time": time.process_time,
    "wall clock": time.perf_counter,
}


class Stopwatch(TrainerCallback):
    """Seconds of every step, and of the shaper within it, on each clock."""

    def __init__(self, shaper: Shaper) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []
        self.within = dict.fromkeys(CLOCKS, 0.0)
        self.since: dict[str, float] | None = None
        for name in ("begin", "score", "score_ids", "penalties"):
            setattr(shaper, name, self.timed(getattr(shaper, name)))

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = {name: clock() for name, clock in CLOCKS.items()}
            try:
                return method(*args, **kwargs)
            finally:
                for name, clock in CLOCKS.items():
                    self.within[name] += clock() - started[name]

        return call

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = {name: clock() for name, clock in CLOCKS.items()}
        if self.since is not None:  # the first step warms up
            self.steps.append({name: (now[name] - self.since[name], self.within[name]) for name in CLOCKS})
        self.since, self.within = now, dict.fromkeys(CLOCKS, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainer", choices=["grpo", "ppo"], required=True)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = shaped_runs.Setting(0, 0)
    flags, scorer, penalty = setting.flags("truth"), setting.scorer("max"), AdaptivePenalty()
    shaped: Any
    if options.trainer == "grpo":
        shaped = ShapedReward(setting.reward, scorer, flags, penalty)
        build = shaped_runs.grpo_trainer
    else:
        shaped = ShapedRewardModel(setting.reward, scorer, flags, penalty)
        build = shaped_runs.ppo_trainer
    watch = Stopwatch(shaped.shaper)
    with tempfile.TemporaryDirectory() as directory:
        training = replace(shaped_runs.TRAINING[options.trainer, "fast"], steps=options.steps)
        trainer = build(setting, shaped, directory, training)
        trainer.add_callback(watch)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    table = Table("clock", "a step (s)", "scoring (s)", "scoring / the rest of the step (95 %)")
    for name in CLOCKS:
        whole, part = np.array([step[name] for step in watch.steps]).T
        ratio = part / (whole - part)
        low, high = bootstrap((ratio,), np.median, rng=np.random.default_rng(0)).confidence_interval
        table.add_row(
            name,
            f"{np.median(whole):.3f}",
            f"{np.median(part):.4f}",
            f"{np.median(ratio):.1%} [{low:.1%}, {high:.1%}]",
        )
    console = Console()
    console.print(
        f"{options.trainer.upper()}, {len(watch.steps)} steps of {training.batch_size} "
        f"responses, {len(flags)} flags"
    )
    console.print(table)


if __name__ == "__main__":
    main()
