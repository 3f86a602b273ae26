"""What the attribution callback costs a DPO step: paired steps of trainers with and without it, taking turns.

Every variant is a whole TRL trainer in a thread of its own. They take turns, one optimizer step each, in an order
drawn again every round; a turn lasts from the beginning of a step to the beginning of that trainer's next one, so
logging and writing the record count. Reported is the median over rounds of time / time of the base, with a
bootstrap interval. Without options it times a tiny model; `--model DIR --data PAIRS` times a real one.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
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
from datasets import Dataset
from meter import Stages
from rich.console import Console
from rich.table import Table
from sae_lens import SAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from scipy.stats import bootstrap
from tiny import TINY, Parts, quiet_config, tiny_parts
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOTrainer

from trl_sae_audit import FeatureAttributionCallback, FeatureDictionary, load_dictionary
from trl_sae_audit.data.opener import open_dataset
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.saes.encoder import SaeLensEncoder

OPTIONS: dict[str, dict[str, Any]] = {
    "attribution alone": {"selection": False},
    "default scores": {},
    "default scores, no contexts": {"contexts": False},
    "token scores": {"selection": False, "token_scores": True},
}
VARIANTS = ("without", *OPTIONS, "naive, every token")


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

        resolve_hook_point(model, self.dictionary.hook_names).module.register_forward_hook(forward)


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
    dataset = open_dataset(options.data)
    dataset = dataset.select_columns(["prompt", "chosen", "rejected"]).shuffle(seed=0)
    if options.dictionary:
        dictionary = load_dictionary(options.dictionary)
    else:
        width = AutoModelForCausalLM.from_pretrained(options.model).config.get_text_config().hidden_size
        dictionary = FeatureDictionary(
            torch.randn(options.features or 16384, width), options.hook_point, "random"
        )
    build = lambda: AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)  # noqa: E731
    return build, tokenizer, dataset, dictionary


def small_parts(options: argparse.Namespace) -> Parts:
    """Of the tiny model."""
    return tiny_parts(**TINY | ({"features": options.features} if options.features else {}))


def with_encoder(dictionary: FeatureDictionary) -> FeatureDictionary:
    """The same directions as the decoder of a TopK SAE of 32, whose encoder is their transpose."""
    if dictionary.encoder is not None:
        return dictionary
    config = TopKSAEConfig(
        k=32, d_in=dictionary.d_model, d_sae=dictionary.d_sae, metadata=SAEMetadata(model_name="random")
    )
    with torch.random.fork_rng():
        sae = SAE.from_dict(config.to_dict())
    sae.W_dec.data = dictionary.directions
    sae.W_enc.data = dictionary.directions.T.contiguous()
    encoder = SaeLensEncoder(sae)
    return FeatureDictionary(dictionary.directions, dictionary.hook_point, dictionary.name, encoder=encoder)


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
    if variant in OPTIONS:
        trainer.add_callback(
            FeatureAttributionCallback(
                with_encoder(dictionary), directory / "record", watch={"one": 1}, **OPTIONS[variant]
            )
        )
    elif variant.startswith("naive"):
        trainer.add_callback(NaiveCallback(dictionary))
    return trainer


def time_variants(variants: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    turns = Turns(list(variants), options.seed, clock)
    parts = real_parts(options) if options.model else small_parts(options)
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
    """MiB beyond the model and the data, of a process of its own that trains one variant alone."""
    done = subprocess.run(
        [sys.executable, __file__, *argv, "--alone", variant], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"])


def alone(variant: str, options: argparse.Namespace) -> None:
    parts = real_parts(options) if options.model else small_parts(options)
    stages = Stages()  # not ru_maxrss, which begins at the parent's
    with tempfile.TemporaryDirectory() as root, stages.stage(variant):
        make_trainer(variant, parts, options, Path(root)).train()
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else stages.rows[0]["own"]
    print(json.dumps({"peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory of a Hugging Face model; a tiny one is made without")
    parser.add_argument(
        "--dataset", "--data", dest="data", help="JSONL of preference pairs: prompt, chosen, rejected"
    )
    parser.add_argument("--dictionary", help="directory of an SAE; random directions without")
    parser.add_argument(
        "--hook_point", "--hook-point", default="model.layers.9", help="where random directions hook"
    )
    parser.add_argument(
        "--features",
        type=int,
        help="number of random directions (default: 4,096 of a tiny model, 16,384 of another)",
    )
    parser.add_argument("--batch_size", "--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--max_length", "--max-length", type=int, default=256, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of every variant")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument(
        "--logging_steps", "--logging-steps", type=int, default=10, help="TRL's default is 10"
    )
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--base",
        default="without",
        choices=VARIANTS,
        help="one of the variants, by which the others are divided",
    )
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
    if options.base not in options.variants:
        parser.error(f"--base {options.base!r} is not among --variants; add it, or choose one of them")
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
        f"ratio to {options.base}",
        "95 % interval",
        *(["peak MiB"] * options.memory),
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant in options.variants:
        middle, low, high = ratio(times[variant], times[options.base])
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
