"""What a look at the sampled answers costs, in optimizer steps of the same training.

A DPO trainer of a tiny model makes optimizer steps; after each the answers are looked at, and both are timed. Reported are the
median of a look divided by the step before it, with a bootstrap interval, and what sampling costs once.

    OMP_NUM_THREADS=1 python scripts/bench_generations.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import bootstrap
from tiny import TINY, quiet_config, tiny_parts
from transformers import TrainerCallback
from trl import DPOTrainer

from trl_sae_audit import Sampling
from trl_sae_audit.callbacks.generation_prompts import DRAWN
from trl_sae_audit.callbacks.generations import GenerationDrift
from trl_sae_audit.models.hook_points import resolve_hook_point


class Timed(TrainerCallback):
    """Samples when training starts and looks after every step, by the clock it is given."""

    def __init__(self, make: Callable[[Any], GenerationDrift], clock: Callable[[], float]) -> None:
        self.make, self.clock = make, clock
        self.sampling = 0.0
        self.steps: list[float] = []
        self.looks: list[float] = []

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        began = self.clock()
        self.generations = self.make(model)
        self.sampling = self.clock() - began

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = self.clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        ended = self.clock()
        self.generations.measure()
        self.steps.append(ended - self.began)
        self.looks.append(self.clock() - ended)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", "--batch-size", type=int, default=16, help="pairs a step")
    parser.add_argument(
        "--tokens", type=int, default=Sampling.max_new_tokens, help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps and looks")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    options = parser.parse_args()
    build, tokenizer, dataset, dictionary = tiny_parts(**TINY)
    sampling = Sampling(max_new_tokens=options.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = {"per_device_train_batch_size": options.batch_size, "max_steps": options.rounds + 2}
        trainer = DPOTrainer(
            build(),
            build(),
            args=quiet_config(Path(scratch), save_strategy="no", **arguments),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        make = lambda model: GenerationDrift(  # noqa: E731
            trainer, [dictionary], [resolve_hook_point(model, dictionary.hook_names)], sampling
        )
        timed = Timed(make, time.process_time if options.clock == "cpu" else time.perf_counter)
        trainer.add_callback(timed)
        trainer.train()
    lengths = timed.generations._lengths
    paired = np.array(timed.looks[2:]) / np.array(timed.steps[2:])
    interval = bootstrap((paired,), np.median, n_resamples=5000, rng=0).confidence_interval
    Console().print(
        f"{DRAWN} prompts × {sampling.answers} answers of at most {options.tokens} tokens, of which {len(lengths)} with {lengths.sum():,} tokens "
        f"are read, {options.batch_size} pairs a step: a step "
        f"{np.median(timed.steps[2:]):.2f} s, a look {np.median(timed.looks[2:]):.2f} s, {np.median(paired):.2f} steps "
        f"({interval.low:.2f} … {interval.high:.2f}); sampling and encoding {timed.sampling:.1f} s once"
    )


if __name__ == "__main__":
    main()
