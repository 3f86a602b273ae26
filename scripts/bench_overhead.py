"""What the attribution callback costs a DPO step: paired steps of trainers with and without it, taking turns.

Every variant is a whole TRL trainer in a thread of its own. They take turns, one optimizer step each, in an order
drawn anew every round; a turn lasts from the beginning of a step to the beginning of that trainer's next one, so
logging and writing the record count. Reported is the median over rounds of time with / time without, with a
bootstrap interval. Without options it times a tiny model; `--model DIR --data PAIRS` times a real one.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from tiny import quiet_config, tiny_parts
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOTrainer

from trl_sae_audit import FeatureAttributionCallback, FeatureDictionary, load_dictionary
from trl_sae_audit.hook_points import resolve_hook_point

VARIANTS = ("without", "default scores", "token scores", "naive, every token")
TINY = {"width": 256, "layers": 4, "features": 4096, "hook_point": "model.layers.2"}


class NaiveCallback(TrainerCallback):
    """What one writes first: project every token's gradient, then sum."""

    def __init__(self, dictionary: FeatureDictionary) -> None:
        self.dictionary = dictionary
        self.directions = dictionary.directions
        self.total = torch.zeros(dictionary.d_sae)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def forward(module: Any, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled() and output.requires_grad:
                output.register_hook(backward)

        def backward(gradient: torch.Tensor) -> None:
            projected = -(gradient.float() @ self.directions.T)
            self.total += projected.sum((0, 1))

        resolve_hook_point(model, self.dictionary.hook_point).module.register_forward_hook(forward)


class Turns:
    """Lets one thread at a time make one step; the order is shuffled every round."""

    def __init__(self, names: list[str], seed: int, clock: Callable[[], float]) -> None:
        self.names = names
        self.clock = clock
        self.condition = threading.Condition()
        self.random = random.Random(seed)
        self.order: list[str] = []
        self.started: float | None = None
        self.times: dict[str, list[float]] = {name: [] for name in names}
        self.waiting: set[str] = set()
        self.failure: BaseException | None = None

    def next(self, name: str) -> None:
        """Hand the turn on and wait for the next one of `name`."""
        with self.condition:
            self._hand_on(name)
            self.waiting.add(name)
            if len(self.waiting) == len(self.names) and not self.order:
                self._new_round()
            self.condition.notify_all()
            self.condition.wait_for(lambda: self.failure or (self.order and self.order[0] == name))
            if self.failure:
                raise SystemExit
            self.waiting.discard(name)
            self.started = self.clock()

    def leave(self, name: str) -> None:
        with self.condition:
            self._hand_on(name)
            self.names = [other for other in self.names if other != name]
            if self.names and not self.order and len(self.waiting) == len(self.names):
                self._new_round()
            self.condition.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.condition:
            self.failure = error
            self.condition.notify_all()

    def _hand_on(self, name: str) -> None:
        if self.order and self.order[0] == name and self.started is not None:
            self.times[name].append(self.clock() - self.started)
            self.order.pop(0)
            self.started = None

    def _new_round(self) -> None:
        self.order = list(self.names)
        self.random.shuffle(self.order)


class TakeTurns(TrainerCallback):
    def __init__(self, name: str, turns: Turns) -> None:
        self.name, self.turns = name, turns

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns.next(self.name)


def real_parts(options: argparse.Namespace) -> tuple[Callable[[], Any], Any, Dataset, FeatureDictionary]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset = load_dataset("json", data_files=options.data, split="train")
    dataset = dataset.select_columns(["prompt", "chosen", "rejected"]).shuffle(seed=0)
    if options.dictionary:
        dictionary = load_dictionary(options.dictionary)
    else:
        width = AutoModelForCausalLM.from_pretrained(options.model).config.get_text_config().hidden_size
        dictionary = FeatureDictionary(torch.randn(options.features, width), options.hook_point, "random")
    build = lambda: AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)  # noqa: E731
    return build, tokenizer, dataset, dictionary


def make_trainer(variant: str, parts: Any, options: argparse.Namespace, directory: Path) -> DPOTrainer:
    build, tokenizer, dataset, dictionary = parts
    trainer = DPOTrainer(
        build(),
        build(),
        args=quiet_config(
            directory / "out",
            per_device_train_batch_size=options.batch_size,
            max_steps=options.warmup + options.rounds,
            max_length=options.max_length,
            logging_steps=options.logging_steps,
            optim=options.optim,
            save_strategy="no",
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    if variant in ("default scores", "token scores"):
        trainer.add_callback(
            FeatureAttributionCallback(
                dictionary, directory / "record", watch={"one": 1}, token_scores=variant == "token scores"
            )
        )
    elif variant.startswith("naive"):
        trainer.add_callback(NaiveCallback(dictionary))
    return trainer


def time_variants(variants: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    turns = Turns(list(variants), options.seed, clock)
    parts = real_parts(options) if options.model else tiny_parts(**TINY)
    with tempfile.TemporaryDirectory() as root:
        trainers = {}
        for variant in variants:
            directory = Path(root) / variant.replace(" ", "_")
            trainers[variant] = make_trainer(variant, parts, options, directory)
            trainers[variant].add_callback(TakeTurns(variant, turns))

        def run(variant: str) -> None:
            try:
                trainers[variant].train()
                turns.leave(variant)
            except BaseException as error:
                turns.fail(error)
                raise

        threads = [threading.Thread(target=run, args=(variant,)) for variant in variants]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failure:
        raise turns.failure
    return {name: times[options.warmup :] for name, times in turns.times.items()}


def ratio(times: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median of paired ratios with a 95 % bootstrap interval."""
    paired = np.array(times) / np.array(base)
    interval = bootstrap(
        (paired,), np.median, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    return float(np.median(paired)), float(interval.low), float(interval.high)


def peak_memory(variant: str, argv: list[str]) -> float:
    """MiB, of a process of its own that trains one variant alone."""
    done = subprocess.run(
        [sys.executable, __file__, *argv, "--alone", variant], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"])


def alone(variant: str, options: argparse.Namespace) -> None:
    parts = real_parts(options) if options.model else tiny_parts(**TINY)
    with tempfile.TemporaryDirectory() as root:
        make_trainer(variant, parts, options, Path(root)).train()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory of a Hugging Face model; a tiny one is made without")
    parser.add_argument("--data", help="JSONL of preference pairs: prompt, chosen, rejected")
    parser.add_argument("--dictionary", help="directory of an SAE; random directions without")
    parser.add_argument("--hook-point", default="model.layers.9", help="where random directions hook")
    parser.add_argument("--features", type=int, default=16384, help="number of random directions")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of every variant")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--logging-steps", type=int, default=10, help="TRL's default is 10")
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the thread's own processor time, for a busy machine; with OMP_NUM_THREADS=1 that is all there is",
    )
    parser.add_argument("--memory", action="store_true", help="also peak memory, one process a variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone, options)
        return
    times = time_variants(options.variants, options)
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    table = Table(
        title=f"DPO step on {device} ({platform.machine()}), {options.rounds} paired rounds, {options.clock} time"
    )
    for column in (
        "variant",
        "median step",
        "ratio to without",
        "95 % interval",
        *(["peak MiB"] * options.memory),
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant in options.variants:
        middle, low, high = ratio(times[variant], times["without"])
        cells = [
            variant,
            f"{1000 * np.median(times[variant]):.1f} ms",
            f"{middle:.4f}",
            f"{low:.4f} … {high:.4f}",
        ]
        if options.memory:
            cells.append(f"{peak_memory(variant, sys.argv[1:]):.0f}")
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
