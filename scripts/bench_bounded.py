"""Does a long run grow? Real optimizer steps of a DPO trainer on a model so small that a hundred thousand take minutes.

Reports, for every tenth of the run, what a step took, the most memory the process held, and the size of the record: time
and memory must stay flat, the totals within a constant, the rows grow by as many bytes every step. With `--without`
the same trainer runs without the callback, to see what is its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from tiny import quiet_config, tiny_parts
from transformers import TrainerCallback
from trl import DPOTrainer

from trl_sae_audit import FeatureAttributionCallback, RunRecord

SAMPLES = 100
"""Looks at the memory in every tenth of the run."""


class Growth(TrainerCallback):
    """One row for every tenth of the run."""

    def __init__(self, record: Path, steps: int) -> None:
        self.record, self.tenth = record, max(1, steps // 10)
        self.process = psutil.Process()
        self.rows: list[list[str]] = []
        self.peak = 0
        self.began = self.clocks()

    @staticmethod
    def clocks() -> tuple[float, float]:
        """Wall clock and processor time, in ms."""
        return 1000 * time.perf_counter(), 1000 * time.process_time()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = self.clocks()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % max(1, self.tenth // SAMPLES) == 0:
            self.peak = max(self.peak, self.process.memory_info().rss)
        if step % self.tenth == 0:
            took, busy = (
                (now - then) / self.tenth for now, then in zip(self.clocks(), self.began, strict=True)
            )
            files = [path for path in self.record.rglob("*") if path.is_file()]
            rows, totals = (
                sum(path.stat().st_size for path in files if path.suffix == suffix)
                for suffix in (".parquet", ".safetensors")
            )
            self.rows.append(
                [
                    f"{step:,}",
                    f"{took:.2f}",
                    f"{busy:.2f}",
                    f"{self.peak / 2**20:.0f}",
                    f"{rows / 2**20:.2f}",
                    f"{rows / step:.0f}",
                    f"{totals / 2**20:.1f}",
                    str(len(files)),
                ]
            )
            print(" | ".join(self.rows[-1]), flush=True)
            self.began, self.peak = self.clocks(), 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--width", type=int, default=16, help="d_model")
    parser.add_argument("--pairs", type=int, default=2, help="pairs a step")
    parser.add_argument("--logging_steps", "--logging-steps", type=int, default=100)
    parser.add_argument(
        "--save_steps", "--save-steps", type=int, default=10_000, help="steps between two checkpoints"
    )
    parser.add_argument("--without", action="store_true", help="train without the callback")
    options = parser.parse_args()
    build, tokenizer, pairs, dictionary = tiny_parts(
        width=options.width,
        layers=1,
        features=options.features,
        hook_point="model.layers.0",
        words=60,
        length=(2, 6),
    )
    with tempfile.TemporaryDirectory() as root:
        record = Path(root) / "record"
        trainer = DPOTrainer(
            build(),
            args=quiet_config(
                Path(root) / "out",
                per_device_train_batch_size=options.pairs,
                max_steps=options.steps,
                learning_rate=1e-5,
                logging_steps=options.logging_steps,
                save_steps=options.save_steps,
                save_total_limit=1,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
            ),
            train_dataset=pairs,
            processing_class=tokenizer,
            callbacks=[]
            if options.without
            else [FeatureAttributionCallback(dictionary, record, watch={"one": 1})],
        )
        growth = Growth(record, options.steps)
        trainer.add_callback(growth)
        trainer.train()
        if not options.without:
            assert RunRecord.load(record).last_step == options.steps
    table = Table(title=f"{options.steps:,} steps, {options.features:,} features")
    for column in (
        "steps",
        "ms a step",
        "of a processor",
        "peak resident MiB",
        "rows MiB",
        "bytes of rows a step",
        "totals MiB",
        "files",
    ):
        table.add_column(column, justify="right")
    for row in growth.rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
