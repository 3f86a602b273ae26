"""What an audit with its lookahead takes, in time and memory, beside forward and backward passes over the same pairs.

    OMP_NUM_THREADS=1 python scripts/bench_lookahead.py
    OMP_NUM_THREADS=1 python scripts/bench_lookahead.py --model DIR --sae DIR --data pairs.jsonl --pairs 8 --rounds 2

Both in turns in one process; then each alone in a process, for its peak memory beyond the loaded model. The lookahead samples one token
of one answer, so that what is left is the pass over the pairs. Without a model, a random Llama of 4 layers of 256.

The passes beside it are those of a training step: the pairs of a step at once, every token's logits, a gradient of every parameter.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from meter import Stages
from peft import LoraConfig, get_peft_model
from tiny import model_parser, parts_of
from trl import DPOConfig

from trl_sae_audit import LookaheadConfig, audit_preferences
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.models.sampling import Sampling

STEP = 8  # pairs


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--lora", action="store_true", help="train an adapter of rank 16; its size is the unit then"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    parser.add_argument("--memory_of", choices=("passes", "audit"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size, tokens, runs = load(options)
    if options.memory_of:
        stages = Stages()  # not ru_maxrss, which begins at the parent's
        with stages.stage(options.memory_of):
            runs[options.memory_of]()
        print(stages.rows[0]["own"] * 2**20 / size)
        return
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            began = clock()
            run()
            times[name].append(clock() - began)
    ratios = [one / other for one, other in zip(times["audit"], times["passes"], strict=True)]
    print(
        f"{options.pairs} pairs of {tokens} tokens in all, padding not counted; the size of the trained parameters is {size / 2**20:.0f} MiB"
    )
    for name, seconds in times.items():
        command = [sys.executable, *sys.argv, "--memory_of", name]
        memory = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[-1])
        print(
            f"{name:8s} {statistics.median(seconds):8.2f} s, peak {memory:5.2f} parameter sizes beyond the model"
        )
    print(
        f"the audit takes {statistics.median(ratios):.2f} of forward and backward ({', '.join(f'{r:.2f}' for r in ratios)})"
    )


def load(options: argparse.Namespace) -> tuple[int, int, dict[str, Callable[[], Any]]]:
    """Bytes of the trained parameters, tokens of the pairs, and the two runs."""
    build, tokenizer, rows, dictionary = parts_of(options, options.pairs)
    model = build()
    if options.lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = DPOConfig("unused", max_length=options.max_length, bf16=False, report_to="none", use_cpu=True)
    loss = PreferenceLoss(tokenizer, config)
    examples = loss.tokenize([(number, row) for number, row in enumerate(rows)])
    batches = [loss.collate(examples[start : start + STEP]) for start in range(0, len(examples), STEP)]
    sampling = Sampling(answers=1, max_new_tokens=1)
    ahead = LookaheadConfig([{"prompt": rows[0]["prompt"]}], sampling=sampling, groups=2)

    def passes() -> None:
        model.train()
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            first, second = (log_probs * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
            (-torch.nn.functional.logsigmoid(0.1 * (first - second)).mean()).backward()
        model.zero_grad()

    def audit() -> None:
        with tempfile.TemporaryDirectory() as directory:
            arguments = (model, tokenizer, rows, dictionary)
            audit_preferences(
                *arguments,
                args=config,
                output_dir=directory,
                lookahead=ahead,
                batch_size=STEP,
                progress=False,
            )

    size = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return size, tokens, {"passes": passes, "audit": audit}


if __name__ == "__main__":
    main()
