"""What the callback costs a GRPO step: every variant alone in a process, in turns, since a second GRPOTrainer in one process is slower.

    OMP_NUM_THREADS=1 python scripts/bench_grpo.py
    OMP_NUM_THREADS=1 python scripts/bench_grpo.py --features 65536 --rounds 5

A random Llama of 4 layers of 256; each process makes some steps of four answers to each prompt and reports the median processor time of
those after the first two. Reported is the median over rounds of with / without, and the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_overhead import with_encoder
from tiny import TINY, tiny_parts
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_sae_audit import FeatureAttributionCallback

OPTIONS: dict[str, dict[str, Any]] = {"default scores": {}, "attribution alone": {"selection": False}}
VARIANTS = ("without", *OPTIONS)


class Clock(TrainerCallback):
    """When each step begins, in processor seconds."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.process_time())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=TINY["features"])
    parser.add_argument("--prompts", type=int, default=4, help="a step")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--steps", type=int, default=12, help="timed, after two others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(f"\n{json.dumps(step_seconds(options))}")
        return
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, seconds in times.items():
            command = [sys.executable, *sys.argv, "--alone", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds.append(json.loads(done.stdout.splitlines()[-1]))
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds, times["without"], strict=True)]
        print(
            f"{name}: {statistics.median(seconds):.3f} s a step, {statistics.median(ratios):.3f} of a step without "
            f"({min(ratios):.3f} … {max(ratios):.3f})"
        )


def step_seconds(options: argparse.Namespace) -> float:
    """Of the steps of one variant."""
    build, tokenizer, dataset, dictionary = tiny_parts(**TINY | {"features": options.features})
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        callbacks: list[TrainerCallback] = [clock]
        if options.alone in OPTIONS:
            record = Path(directory) / "record"
            chosen = OPTIONS[options.alone]
            callbacks.append(FeatureAttributionCallback(with_encoder(dictionary), record, **chosen))
        GRPOTrainer(
            build(),
            reward_funcs=lambda completions, **kwargs: [
                float(len(set(text.split()))) for text in completions
            ],
            args=GRPOConfig(
                output_dir=directory,
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                log_level="error",
                save_strategy="no",
                num_generations=4,
                per_device_train_batch_size=4 * options.prompts,
                max_completion_length=options.tokens,
                max_steps=options.steps + 3,
            ),
            train_dataset=dataset.select_columns("prompt"),
            processing_class=tokenizer,
            callbacks=callbacks,
        ).train()
    steps = [end - begin for begin, end in zip(clock.begun, clock.begun[1:], strict=False)]
    return statistics.median(steps[2:])


if __name__ == "__main__":
    main()
