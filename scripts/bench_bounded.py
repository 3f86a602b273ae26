"""Does the record of a long run grow? Simulated optimizer steps of random gradients, everything else real.

Feeds a dictionary of many features with random per-example gradients, as a trainer's steps would, and writes the
run record. Reports, for every tenth of the run, the time a step took, the resident memory and the size of the record:
the totals must not grow at all, the rows by a constant number of bytes a step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from trl_sae_audit import FeatureDictionary, RunRecord
from trl_sae_audit.channel import Channel
from trl_sae_audit.hook_points import HookPoint
from trl_sae_audit.record_writer import RecordWriter


def size_of(directory: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in directory.rglob(pattern))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=262_144)
    parser.add_argument(
        "--width", type=int, default=64, help="d_model; only the projection's cost depends on it"
    )
    parser.add_argument("--examples", type=int, default=8, help="examples a step")
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--flush-seconds", type=float, default=30.0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(options.features, options.width, generator=generator)
    dictionary = FeatureDictionary(directions, "model.layers.0", "random")
    module = nn.Identity()
    channel = Channel(
        dictionary,
        HookPoint("model.layers.0", module, module),
        {"one": 1},
        top_k=20,
        health_tokens=0,
        token_scores=False,
        totals=None,
    )
    table = Table(title=f"{options.steps} steps, {options.features} features")
    for column in (
        "steps",
        "ms a step",
        "resident MiB",
        "totals MiB",
        "rows MiB",
        "bytes of rows a step",
        "files",
    ):
        table.add_column(column, justify="right")
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "record"
        writer = RecordWriter.create(
            directory, {"trainer": "simulated", "dictionaries": [asdict(dictionary.info)]}
        )
        tenth = options.steps // 10
        started = flushed = time.perf_counter()
        peak = 0
        for step in track(range(1, options.steps + 1), description="simulating"):
            rows = torch.randn(options.examples, options.width, generator=generator)
            channel.buffer.add(rows, torch.ones(options.examples), paired=False, tokens=None)
            channel.buffer.finish_step(1.0)
            if step % options.logging_steps == 0:
                steps = np.arange(step - options.logging_steps + 1, step + 1)
                tables = channel.project(
                    {"step": steps, "global_step": steps}, channel.pack(), keep_examples=False
                )
                for name, parts in tables.items():
                    for part in parts:
                        writer.append(name, part)
                channel.take_window()
                peak = max(peak, process.memory_info().rss)
            if time.perf_counter() - flushed > options.flush_seconds or step % tenth == 0:
                writer.flush(step, {"random": channel.totals})
                flushed = time.perf_counter()
                peak = max(peak, process.memory_info().rss)
            if step % tenth == 0:
                now = time.perf_counter()
                rows_size = size_of(directory, "*.parquet")
                table.add_row(
                    str(step),
                    f"{1000 * (now - started) / tenth:.2f}",
                    f"{peak / 2**20:.0f}",
                    f"{size_of(directory, '*.safetensors') / 2**20:.1f}",
                    f"{rows_size / 2**20:.2f}",
                    f"{rows_size / step:.0f}",
                    str(sum(1 for path in directory.rglob("*") if path.is_file())),
                )
                started, peak = time.perf_counter(), 0
        writer.close("finished", options.steps, {"random": channel.totals})
        assert RunRecord.load(directory).last_step == options.steps
    Console().print(table)


if __name__ == "__main__":
    main()
