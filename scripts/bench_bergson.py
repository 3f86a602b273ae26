"""Our passes over pairs beside bergson's collection of gradients and beside forward and backward alone, on the same tokens.

    OMP_NUM_THREADS=1 python scripts/bench_bergson.py --model DIR --sae DIR --data pairs.jsonl --bergson bergson-env/bin/python

bergson (EleutherAI; attribution by the gradients of parameters) needs an environment of its own, and says nothing without it:

    python -m venv bergson-env
    bergson-env/bin/pip install bergson==2.5.1 torch==2.13.0
    bergson-env/bin/pip uninstall -y torchvision torchaudio      # of other builds than torch, and not needed here

Each figure is of a process of its own, one thread: processor seconds of the second of two runs (of the only one with --once), and peak
memory beyond the loaded model. bergson projects the gradient of each module to 16 × 16 numbers, as its Trackstar does. Its loss is the
cross-entropy of the answers, ours DPO's: the products are the same but for what is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meter import Stages

TOKENS = 1024
OURS = ("forward", "forward and backward", "audit's pass", "audit's pass with the lookahead's gradient")
SKIPPED = "bergson was not measured: pass --bergson with the Python of an environment that has it; --help says how to make one."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--dictionary", "--sae", dest="sae", required=True)
    parser.add_argument("--dataset", "--data", dest="data", required=True)
    parser.add_argument("--bergson", help="the Python of an environment that has bergson")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=160)
    parser.add_argument("--once", action="store_true", help="no run before the one that is timed")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as directory:
        options.rows = Path(directory) / "rows.json"
        write_rows(options)
        table = {name: alone(sys.executable, name, options) for name in OURS}
        if options.bergson:
            table["bergson's collection"] = alone(options.bergson, "bergson", options)
    floor = table["forward and backward"]["seconds"]
    for name, found in table.items():
        print(
            f"{name}: {found['seconds']:.2f} s, {found['seconds'] / floor:.2f} of forward and backward; peak {found['peak']:,.0f} MiB"
        )
    if not options.bergson:
        print(SKIPPED)


def write_rows(options: argparse.Namespace) -> None:
    """Token ids and labels of all answers, as TRL cuts them."""
    loss, examples = preference_examples(options)
    rows = []
    for example in examples:
        batch = loss.collate([example])
        for ids, real, own in zip(*(batch[name] for name in ("input_ids", "attention_mask", "completion_mask")), strict=True):  # fmt: skip
            labels = ids.masked_fill(own == 0, -100)
            rows.append({"input_ids": ids[real.bool()].tolist(), "labels": labels[real.bool()].tolist()})
    options.rows.write_text(json.dumps(rows), encoding="utf-8")


def preference_examples(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    from transformers import AutoTokenizer
    from trl import DPOConfig

    from trl_sae_audit.audit.objectives import PreferenceLoss
    from trl_sae_audit.data.opener import iterate_rows

    args = DPOConfig("unused", max_length=options.max_length, bf16=False, report_to="none", use_cpu=True)
    loss = PreferenceLoss(AutoTokenizer.from_pretrained(options.model), args)
    rows = [(row.index, row.columns) for row in iterate_rows(options.data) if row.columns is not None]
    return loss, loss.tokenize(rows[: options.pairs])


def alone(python: str, name: str, options: argparse.Namespace) -> dict[str, float]:
    command = [python, *sys.argv, "--alone", name, "--rows", str(options.rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> None:
    """Prints seconds and MiB of one of the runs."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    run = of_bergson(model, options) if options.alone == "bergson" else of_ours(model, options)
    stages = Stages()
    with stages.stage(options.alone):
        for _ in range(1 if options.once else 2):
            began = time.process_time()
            run()
            seconds = time.process_time() - began
    print(f"\n{json.dumps({'seconds': seconds, 'peak': stages.rows[0]['own']})}")


def of_bergson(model: Any, options: argparse.Namespace) -> Callable[[], Any]:
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from datasets import Dataset

    data = Dataset.from_list(json.loads(options.rows.read_text(encoding="utf-8")))
    data = data.add_column("length", [len(row) for row in data["input_ids"]])
    order = sorted(range(len(data)), key=lambda place: -data[place]["length"])
    batches: list[list[int]] = [[]]
    for place in order:
        if batches[-1] and data[batches[-1][0]]["length"] * (len(batches[-1]) + 1) > TOKENS:
            batches.append([])
        batches[-1].append(place)

    def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            config = IndexConfig(str(Path(directory) / "index"), projection_dim=16, token_batch_size=TOKENS)
            config.partial_run_path.mkdir(parents=True)
            processor = GradientProcessor(projection_dim=16)
            collect_gradients(model, data, processor, config, batches=batches)

    return run


def of_ours(model: Any, options: argparse.Namespace) -> Callable[[], Any]:
    import torch
    import torch.nn.functional as F

    from trl_sae_audit import load_dictionary
    from trl_sae_audit.audit.gradients import AuditPass
    from trl_sae_audit.audit.lookahead.lookahead import Lookahead
    from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
    from trl_sae_audit.models.batches import pad, token_batches
    from trl_sae_audit.models.hook_points import resolve_hook_point

    dictionary = load_dictionary(options.sae)
    point = resolve_hook_point(model, dictionary.hook_names)
    loss, examples = preference_examples(options)
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    places = list(token_batches([len(row["input_ids"]) for row in rows], TOKENS))

    def passes(backward: bool) -> None:
        for some in places:
            ids, real = pad([rows[place]["input_ids"] for place in some])
            labels, _ = pad([rows[place]["labels"] for place in some], -100)
            with torch.set_grad_enabled(backward):
                logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
                total = F.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
                )
            if backward:
                total.backward()
        model.zero_grad()

    def ahead() -> None:
        audit = AuditPass(model, point, dictionary, loss)
        step = Lookahead(
            model, point, dictionary, loss, UpdateRule(batch_size=4), lambda: [examples], lambda: []
        )

        def watch(*differentiated: Any) -> None:
            audit.score(*differentiated)

        step.take(watch)

    runs: list[Callable[[], Any]] = [
        lambda: passes(False),
        lambda: passes(True),
        lambda: AuditPass(model, point, dictionary, loss).run(examples, 8),
        ahead,
    ]
    return runs[OURS.index(options.alone)]


if __name__ == "__main__":
    main()
