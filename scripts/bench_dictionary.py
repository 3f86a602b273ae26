"""What a dictionary of many features takes in memory and time, wherever features times something is held.

    python scripts/bench_dictionary.py --features 16384 65536 262144 1048576
    python scripts/bench_dictionary.py --features 1048576 --dtype bfloat16
    python scripts/bench_dictionary.py --features 1048576 --width 16 --trainer
    python scripts/bench_dictionary.py --features 16384 131072 --directions --pairs 8

Every size is a process of its own, with a random JumpReLU SAE that it saves and loads. "own" is the memory of the process's
own beyond what the imports took, at most during a stage and at its end; "mapped" are the pages of files that were in memory
at its end, which processes share and the system may drop; seconds are processor time, since others may use the machine. With
`--trainer` a tiny model is trained with TRL's DPO, with and without the callback. With `--directions` a random Llama of 4 layers of
256 is audited with directions that have no encoder, of which every one is active at every token: what the audit keeps of a pair as it
is, and with the figures of every active feature, as for an SAE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from meter import Stages
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from trl_sae_audit import FeatureAttributionCallback, FeatureDictionary, RunRecord, load_dictionary
from trl_sae_audit.attribution.feature_tracker import FeatureTracker
from trl_sae_audit.attribution.gradient_hook import ForwardRecord, TokenView
from trl_sae_audit.attribution.microbatch import RowGradients
from trl_sae_audit.audit.gradients import PROMPT_TAIL, ExampleArrays, active_features
from trl_sae_audit.audit.prompt_states import state_size
from trl_sae_audit.audit.statistics import ResamplingConfig, feature_statistics
from trl_sae_audit.audit.store import Part
from trl_sae_audit.models.hook_points import HookPoint
from trl_sae_audit.record.writer import RecordWriter

EXAMPLES, TOKENS = 8, 200


def save_sae(directory: Path, features: int, width: int) -> None:
    """A random JumpReLU SAE in sae-lens' format, about 40 features active a token."""
    generator = torch.Generator().manual_seed(0)
    decoder = torch.empty(features, width)
    some = torch.randn(8192, width, generator=generator) / width**0.5
    for start in range(0, features, 8192):
        rows = decoder[start : start + 8192]
        rows[:] = some[: len(rows)].roll(start // 8192 % width, dims=1)
    config = {
        "architecture": "jumprelu",
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "model.layers.0", "sae_lens_version": "6.54.12"},
    }
    directory.mkdir()
    (directory / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    threshold = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - 40 / features)))
    weights = {
        "W_dec": decoder,
        "W_enc": decoder.T.contiguous(),
        "b_enc": torch.zeros(features),
        "b_dec": torch.zeros(width),
        "threshold": torch.full((features,), threshold),
    }
    save_file(weights, directory / "sae_weights.safetensors")


def stages_of(features: int, width: int, options: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Loading, training, an answer and the statistics of an audit."""
    pairs = options.pairs
    stages, generator = Stages(), torch.Generator().manual_seed(1)
    with stages.stage("load"):
        dictionary = load_dictionary(root / "sae", dtype=getattr(torch, options.dtype))
    size = 0 if options.only_audit else training_stages(stages, dictionary, generator, root)
    hidden = torch.randn(TOKENS, width, generator=generator)
    answer = torch.ones(TOKENS, dtype=torch.bool)
    with stages.stage(f"audit: an answer of {TOKENS} tokens"):
        found = active_features(dictionary, hidden, hidden, answer, answer, answer * 0.05)
    arrays = ExampleArrays(
        gradient=np.random.default_rng(0).standard_normal((pairs, 2, width), dtype=np.float32),
        side=np.tile(np.array([1, -1], np.int8), (pairs, 1)),
        length=np.full((pairs, 2), TOKENS, np.int32),
        log_prob=np.zeros((pairs, 2), np.float32),
        weight=np.tile(np.array([0.05, -0.05], np.float32), (pairs, 1)),
        residual=np.zeros((pairs, 2, width), np.float32),
        indptr=np.arange(2 * pairs + 1, dtype=np.int64) * len(found[0]),
        feature=np.tile(found[0], 2 * pairs),
        mean=np.tile(found[1], 2 * pairs),
        max_activation=np.tile(found[2], 2 * pairs),
        activation_attribution=np.tile(found[3], 2 * pairs),
        selected=np.tile(found[4], 2 * pairs),
        peak=np.zeros((2 * pairs * len(found[0])), np.int32),
        active_tokens=np.zeros((2 * pairs * len(found[0])), np.int32),
        token_indptr=np.zeros(pairs * 2 + 1, np.int64),
        token=np.zeros(0, np.int32),
        prompt_tail=np.full((pairs, 2, PROMPT_TAIL), -1, np.int32),
        prompt_state=np.zeros((pairs, state_size(width)), np.float32),
    )
    part = Part(np.arange(pairs), np.zeros((pairs, 32), np.uint8), [], arrays, {})
    with stages.stage(f"audit: statistics of {pairs} pairs, {options.flips:,} flips"):
        feature_statistics(lambda: [part], dictionary, pairs, ResamplingConfig(n_flips=options.flips))
    return [*stages.rows, {"stage": "totals on disk", "own": size / 2**20}]


def training_stages(
    stages: Stages, dictionary: FeatureDictionary, generator: torch.Generator, root: Path
) -> int:
    """What a training run does with a dictionary; the bytes of its totals on disk."""
    module = nn.Identity()
    point = HookPoint("model.layers.0", module, module)
    settings = {"top_k": 20, "health_tokens": 64}
    tracker = FeatureTracker(dictionary, point, {"one": 1}, **settings)  # type: ignore[arg-type]
    header = {"trainer": "simulated", "dictionaries": [asdict(dictionary.info)]}
    writer = RecordWriter.create(root / "record", header)
    with stages.stage(
        "a log: ten steps projected, totals", times=7
    ):  # 70 steps: the time bins are all in use
        for last in range(10, 71, 10):
            for _ in range(10):
                rows = torch.randn(EXAMPLES, dictionary.d_model, generator=generator)
                tracker._microbatches.append(RowGradients.of(rows, torch.ones(EXAMPLES)))
                tracker.end_step(1.0)
            steps = np.arange(last - 9, last + 1)
            tables = tracker.apply(tracker.pack(), {"step": steps, "global_step": steps})
            tracker.take_window()
    for name, parts in tables.items():
        for part in parts:
            writer.append(name, part)
    with stages.stage("a log: health on 64 tokens"):
        assert tracker._sample is not None
        hidden = torch.randn(1, 64, dictionary.d_model, generator=generator)
        tracker._sample(TokenView(hidden, hidden, hidden, ForwardRecord()))
        tracker.measure_health()
    with stages.stage("a flush of the record"):
        writer.flush(tracker.totals.steps, {dictionary.name: tracker.totals})
    size = sum(path.stat().st_size for path in (root / "record").rglob("*.safetensors"))
    writer.close("finished")
    del tracker, writer, tables
    with stages.stage("the record read: features()"):
        RunRecord.load(root / "record").features()
    return size


def trainer_of(features: int, width: int, with_callback: bool, root: Path) -> list[dict[str, Any]]:
    """TRL's DPO on a model of `width`, 30 steps of 4 pairs."""
    from tiny import quiet_config, tiny_parts
    from trl import DPOTrainer

    build, tokenizer, dataset, _ = tiny_parts(width=width, layers=2, features=1, hook_point="model.layers.1")
    dictionary = load_dictionary(root / "sae") if with_callback else None
    stages = Stages()
    with stages.stage("training"):
        trainer = DPOTrainer(
            build(),
            build(),
            args=quiet_config(
                root / "out", per_device_train_batch_size=4, max_steps=30, save_strategy="no", use_cpu=True
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[FeatureAttributionCallback(dictionary, root / "record")] if dictionary else [],
        )
        trainer.train()
    stages.rows[0]["stage"] = "with the callback" if with_callback else "without"
    return stages.rows


def directions_on_disk(features: int, pairs: int) -> None:
    """Bytes that an audit's parts take a pair, and processor seconds of its pass."""
    from rich import print
    from tiny import TINY, tiny_parts

    from trl_sae_audit import audit_preferences
    from trl_sae_audit.audit import run

    most = run._MOST_ENTRIES
    for name, entries in (("sums alone", most), ("figures of every feature", 2**62)):
        run._MOST_ENTRIES = entries
        build, tokenizer, dataset, dictionary = tiny_parts(**TINY | {"features": features}, pairs=pairs)
        with tempfile.TemporaryDirectory() as directory:
            began = time.process_time()
            audit_preferences(
                *(build(), tokenizer, dataset, dictionary),
                output_dir=directory,
                lookahead=None,
                progress=False,
            )
            seconds = time.process_time() - began
            parts = sum(path.stat().st_size for path in (Path(directory) / "parts").rglob("*") if path.is_file())  # fmt: skip
        print(f"{features:,} directions, {name}: {parts / pairs / 1000:,.1f} kB a pair, {seconds / pairs:.2f} s a pair")  # fmt: skip
    run._MOST_ENTRIES = most


def alone(arguments: list[str]) -> list[dict[str, Any]]:
    """A process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "stage": lambda row: row["stage"],
        "own, peak MiB": lambda row: f"{row['own']:,.0f}",
        "own, kept MiB": lambda row: f"{row['kept']:,.0f}" if "kept" in row else "",
        "mapped MiB": lambda row: f"{row['mapped']:,.0f}" if "mapped" in row else "",
        "seconds": lambda row: f"{row['seconds']:.2f}" if "seconds" in row else "",
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, nargs="+", default=[16_384, 65_536, 262_144, 1_048_576])
    parser.add_argument("--width", type=int, default=640, help="d_model")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="how to keep the SAE"
    )
    parser.add_argument("--trainer", action="store_true", help="train a tiny model instead")
    parser.add_argument("--directions", action="store_true", help="audit with bare directions instead")
    parser.add_argument("--flips", type=int, default=9999, help="sign flips of an audit's statistics")
    parser.add_argument("--pairs", type=int, default=64, help="of an audit's statistics")
    parser.add_argument("--only_audit", "--only-audit", action="store_true", help="no training stages")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        features = options.features[0]
        if options.alone == "save":
            save_sae(options.directory / "sae", features, options.width)
            rows = []
        elif options.alone == "stages":
            rows = stages_of(features, options.width, options, options.directory)
        else:
            rows = trainer_of(features, options.width, options.alone == "with", options.directory)
        print(json.dumps(rows))
        return
    for features in options.features:
        if options.directions:
            directions_on_disk(features, options.pairs)
            continue
        with tempfile.TemporaryDirectory() as root:
            common = ["--features", str(features), "--width", str(options.width), "--directory", root]
            common += ["--dtype", options.dtype, "--flips", str(options.flips), "--pairs", str(options.pairs)]
            common += ["--only-audit"] * options.only_audit
            alone([*common, "--alone", "save"])
            rows = []
            for what in ("without", "with") if options.trainer else ("stages",):
                rows += alone([*common, "--alone", what])
        title = f"{features:,} features of {options.width}, {options.dtype}"
        Console(width=110).print(table_of(title, rows))


if __name__ == "__main__":
    main()
