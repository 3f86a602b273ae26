"""What `trl-sae-audit cost` says, against what is measured on this machine.

    OMP_NUM_THREADS=1 python scripts/bench_cost.py

FLOPs: a small Llama trained by TRL's DPO with and without the callback, under torch's FlopCounterMode, which counts matrix products.
Network: the same in two processes, the bytes given to torch.distributed. Disk: a record of 2,000 steps. Memory: a process that trains
with 262,144 features, less one that trains without. Seconds: of the totals, a feature and a step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import FeatureAttributionCallback, FeatureDictionary
from trl_sae_audit.attribution.feature_tracker import FeatureTracker
from trl_sae_audit.attribution.microbatch import RowGradients
from trl_sae_audit.attribution.step_tables import ScoredSteps, Window
from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.cli.cost import CostEstimate, RunShape, estimate_cost, shape_of, train_flops
from trl_sae_audit.models.hook_points import HookPoint
from trl_sae_audit.record.writer import RecordWriter

WORDS, PROMPT, ANSWER = 500, 24, 23
TOKENS = PROMPT + ANSWER + 1  # and the end of the answer


@dataclass(frozen=True)
class Case:
    """One setting of the small run."""

    layers: int = 3
    width: int = 64
    features: int = 4096
    batch: int = 2
    accumulation: int = 2
    steps: int = 4
    logging_steps: int = 2
    checkpointing: bool = True
    token_scores: bool = False
    probe_rows: int = 0

    def run(self, answer_tokens: int = ANSWER + 1, processes: int = 1) -> RunShape:
        return RunShape(
            self.features,
            2,
            "dpo",
            TOKENS,
            answer_tokens,
            self.batch * self.accumulation,
            processes,
            self.steps,
            self.logging_steps,
            self.checkpointing,
            on_gpu=False,
            token_scores=self.token_scores,
            probe_rows=self.probe_rows,
            probe_steps=2,
        )

    def cost(self, processes: int = 1) -> CostEstimate:
        return estimate_cost(shape_of(self.config(), "small"), self.run(processes=processes))

    def train_flops(self) -> float:
        """Estimated for a step here: without a GPU, TRL's head scores every position and not the answer's alone."""
        return train_flops(shape_of(self.config(), "small"), self.run(TOKENS - 1))

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=WORDS,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            attn_implementation="eager",  # its products are counted
        )

    def dictionary(self) -> FeatureDictionary:
        """A JumpReLU SAE of random directions."""
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

        from trl_sae_audit import load_dictionary

        torch.manual_seed(0)
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=self.width, d_sae=self.features))
        return load_dictionary(sae, hook_point="model.layers.1", name="small")

    def trainer(self, directory: Path, *, with_callback: bool) -> DPOTrainer:
        """Every row is of TOKENS tokens."""
        words = [f"w{index}" for index in range(WORDS - 2)]
        vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *words])}
        inner = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
        inner.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
        draw = random.Random(0)

        def text(count: int) -> str:
            return " ".join(draw.choices(words, k=count)) + " "

        rows = [
            {"prompt": text(PROMPT), "chosen": text(ANSWER), "rejected": text(ANSWER)}
            for _ in range(2 * self.batch * self.accumulation * self.steps)
        ]
        torch.manual_seed(0)
        callback = FeatureAttributionCallback(
            self.dictionary(),
            directory / "record",
            watch={"one": 1},
            token_scores=self.token_scores,
            selection_tokens=10**6,  # all of them
            selection=False,
            probe=[text(TOKENS) for _ in range(self.probe_rows)] or None,
            probe_steps=2,
        )
        return DPOTrainer(
            LlamaForCausalLM(self.config()),
            LlamaForCausalLM(self.config()),
            args=DPOConfig(
                output_dir=str(directory / "out"),
                per_device_train_batch_size=self.batch,
                gradient_accumulation_steps=self.accumulation,
                max_steps=self.steps,
                logging_steps=self.logging_steps,
                gradient_checkpointing=self.checkpointing,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[callback] if with_callback else [],
        )


def flops_of(case: Case, *, with_callback: bool) -> float:
    """Of a step, as torch counts them."""
    with tempfile.TemporaryDirectory() as root:
        trainer = case.trainer(Path(root), with_callback=with_callback)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _product}) as counter:
            trainer.train()
    return counter.get_total_flops() / case.steps


def _product(total: torch.Size, a: torch.Size, b: torch.Size, **kwargs: Any) -> int:
    """In place, as in the backward pass of TRL's head; torch's own list has only those that are not."""
    return 2 * a[0] * a[1] * b[1]


def reduced_bytes(case: Case) -> float:
    """What two processes give to torch.distributed in a step; to be called in each of them."""
    given = 0.0
    original = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal given
        given += tensor.nbytes
        return original(tensor, *args, **kwargs)

    with tempfile.TemporaryDirectory() as root:
        trainer = case.trainer(Path(root), with_callback=True)
        torch.distributed.all_reduce = counted
        trainer.train()
        torch.distributed.all_reduce = original
    assert trainer.accelerator.num_processes == 2
    return given / case.steps


def record_bytes(features: int, steps: int) -> tuple[float, float]:
    """Rows a step, and the totals, of a record of random steps."""
    generator, module = torch.Generator().manual_seed(0), nn.Identity()
    dictionary = FeatureDictionary(torch.randn(features, 32, generator=generator), "model.layers.0", "random")
    point = HookPoint("model.layers.0", module, module)
    tracker = FeatureTracker(dictionary, point, {"one": 1})
    with tempfile.TemporaryDirectory() as root:
        header = {"trainer": "simulated", "dictionaries": [asdict(dictionary.info)]}
        writer = RecordWriter.create(Path(root) / "record", header)
        for end in range(50, steps + 1, 50):
            for _ in range(50):
                rows = torch.randn(8, 32, generator=generator)
                tracker._microbatches.append(RowGradients.of(rows, torch.ones(8)))
                tracker.end_step(1.0)
            numbers = np.arange(end - 49, end + 1)
            columns = {"step": numbers, "global_step": numbers}
            for name, parts in tracker.apply(tracker.pack(), columns).items():
                for part in parts:
                    writer.append(name, part)
        writer.close("finished", steps, {"random": tracker.totals})
        sizes = {
            suffix: sum(path.stat().st_size for path in Path(root).rglob(f"*.{suffix}"))
            for suffix in ("parquet", "safetensors")
        }
    return sizes["parquet"] / steps, float(sizes["safetensors"])


def seconds_of_totals(features: int) -> float:
    """Processor seconds of the running totals and the means since the last log, a feature and a step."""
    rng, totals, window = np.random.default_rng(0), FeatureTotals(features), Window(features)
    names = ("attribution", "positive", "negative", "variance", "share")
    scores = {name: rng.standard_normal((4, features), dtype=np.float32) for name in names}
    ones = np.ones(4)
    scored = ScoredSteps({}, scores, {}, None, ones, ones, ones, ones, ones, ones, ones > 0)
    for _ in range(3):  # the last counts
        started = time.process_time()
        totals.update(
            scores["attribution"], scores["positive"], scores["negative"], scores["variance"], scores["share"]
        )
        window.add(scored)
    return (time.process_time() - started) / 4 / features


def peak_of(case: Case, *, with_callback: bool) -> float:
    """Most memory of a process's own while it trains, beyond what it had before; in a process of its own."""
    from meter import Stages

    stages = Stages()
    with tempfile.TemporaryDirectory() as root:
        trainer = case.trainer(Path(root), with_callback=with_callback)
        with stages.stage("training"):
            trainer.train()
    return stages.rows[0]["own"] * 2**20


def alone(what: str, processes: int = 1) -> float:
    """A figure, from a process of its own, or from one of several."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), __file__, "--alone", what]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


MANY = Case(features=262_144, width=16, steps=70, logging_steps=10)
"""More steps than there are time bins."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alone", choices=("network", "with", "without"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        if options.alone == "network":
            figure = reduced_bytes(Case(token_scores=True))
        else:
            figure = peak_of(MANY, with_callback=options.alone == "with")
        print(f"\n{json.dumps(figure)}", flush=True)
        return
    table = Table(title="measured against estimated", title_justify="left")
    for name in ("", "measured", "estimated", "measured / estimated"):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, measured: float, estimated: float) -> None:
        table.add_row(name, f"{measured:,.4g}", f"{estimated:,.4g}", f"{measured / estimated:.3f}")
        print(f"{name}: {measured:.5g} {estimated:.5g}", file=sys.stderr, flush=True)

    for label, case in {
        "defaults": Case(),
        "no checkpointing, a log a step": Case(checkpointing=False, logging_steps=1),
        "token scores and a probe": Case(token_scores=True, probe_rows=3),
    }.items():
        estimated, without = case.cost(), flops_of(case, with_callback=False)
        row(f"FLOPs of a training step, {label}", without, case.train_flops())
        extra = flops_of(case, with_callback=True) - without
        row(f"FLOPs that the callback adds, {label}", extra, sum(estimated.flops.values()))
    rows, totals = record_bytes(4096, 2000)
    estimated = Case(steps=2000).cost()
    row("record on disk: bytes of rows a step", rows, estimated.disk_row)
    row("record on disk: bytes of totals", totals, estimated.disk_totals)
    row("network: bytes added up in a step", alone("network", 2), Case(token_scores=True).cost(2).network)
    held = MANY.cost().host
    row("memory: bytes, with less without", alone("with") - alone("without"), sum(held.values()))
    row(
        "seconds of totals, 1,048,576 features, a step",
        seconds_of_totals(2**20) * 2**20,
        Case(features=2**20).cost().seconds["totals (one core)"],
    )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
