"""An audit with its default lookahead beside one epoch of training on the same pairs: time, parts of the time, and peak memory.

    OMP_NUM_THREADS=1 python scripts/bench_epoch.py
    OMP_NUM_THREADS=1 python scripts/bench_epoch.py --model DIR --sae DIR --data pairs.jsonl --pairs 32 --prompts 8 --max_length 160

Training is TRL's DPO with its defaults (AdamW, gradient checkpointing, a reference model). The two take turns, each in a process of its
own, which measures its processor time and its peak memory beyond the loaded models. The answers that the lookahead samples cost the same
for any number of pairs, so a small number stands for a larger one where the prompts are fewer in proportion.
Without a model, a random Llama of 4 layers of 256.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_overhead import with_encoder
from datasets import Dataset
from meter import Stages
from tiny import model_parser, parts_of, quiet_config
from trl import DPOTrainer

from trl_sae_audit import LookaheadConfig, audit_preferences
from trl_sae_audit.audit.lookahead.lookahead import Lookahead
from trl_sae_audit.audit.lookahead.run import AuditLookahead
from trl_sae_audit.audit.lookahead.sampled_tokens import SampledTokens

PARTS = {
    "the pass over the pairs": (Lookahead, "take"),
    "sampling": (AuditLookahead, "_sample"),
    "derivatives along the step": (SampledTokens, "change_along"),
}


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a step of training")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", choices=("training", "audit"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(options)))
        return
    found: dict[str, list[dict[str, float]]] = {"training": [], "audit": []}
    for _ in range(options.rounds):
        for name, rounds in found.items():
            command = [sys.executable, *sys.argv, "--alone", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{options.pairs} pairs, {options.prompts} prompts held out")
    for name, rounds in found.items():
        for key in rounds[0]:
            print(f"{name}, {key}: {statistics.median(each[key] for each in rounds):.2f}")
    ratios = [
        one["seconds"] / other["seconds"]
        for one, other in zip(found["audit"], found["training"], strict=True)
    ]
    print(
        f"the audit takes {statistics.median(ratios):.2f} of an epoch ({', '.join(f'{r:.2f}' for r in ratios)})"
    )


def alone(options: argparse.Namespace) -> dict[str, float]:
    """One of the two: processor seconds, of an audit by parts, and peak memory in parameter sizes beyond the loaded models."""
    size, run = load(options)
    stages = Stages()  # not ru_maxrss, which begins at the parent's
    with timed_parts() as parts, stages.stage(options.alone):
        began = time.process_time()
        run()
        seconds = time.process_time() - began
    found = {"seconds": seconds, "peak in parameter sizes": stages.rows[0]["own"] * 2**20 / size}
    return found | ({} if options.alone == "training" else parts)


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Processor seconds of the audit's parts, added up."""
    spent, plain = dict.fromkeys(PARTS, 0.0), {}
    for name, (owner, method) in PARTS.items():
        plain[name] = vars(owner)[method]

        def timed(*args: Any, name: str = name, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return plain[name](*args, **kwargs)
            finally:
                spent[name] += time.process_time() - began

        setattr(owner, method, timed)
    try:
        yield spent
    finally:
        for name, (owner, method) in PARTS.items():
            setattr(owner, method, plain[name])


def load(options: argparse.Namespace) -> tuple[int, Callable[[], Any]]:
    """Bytes of the parameters, and the run."""
    build, tokenizer, rows, dictionary = parts_of(options, options.pairs)
    dictionary = with_encoder(dictionary)
    model, reference = build(), build() if options.alone == "training" else None

    def arguments(directory: str) -> Any:
        return quiet_config(
            Path(directory),
            num_train_epochs=1,
            per_device_train_batch_size=options.batch_size,
            max_length=options.max_length,
            save_strategy="no",
        )

    def training() -> None:
        with tempfile.TemporaryDirectory() as directory:
            DPOTrainer(
                model,
                reference,
                args=arguments(directory),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            ).train()

    def audit() -> None:
        with tempfile.TemporaryDirectory() as directory:
            audit_preferences(
                *(model, tokenizer, rows, dictionary),
                args=arguments(directory),
                output_dir=Path(directory) / "audit",
                lookahead=LookaheadConfig(prompts=options.prompts),
                progress=False,
            ).features()

    size = sum(value.numel() * value.element_size() for value in model.parameters())
    return size, training if options.alone == "training" else audit


if __name__ == "__main__":
    main()
