"""What does DPO on real pairs change in what a real instruct model writes, and which score said so?

    python scripts/studies/real_prediction.py runs/smol/model runs/smol/sae pairs.jsonl
    python scripts/studies/natural.py runs/smol/model pairs.jsonl

Real pairs in chat form are audited by default, and the model is trained on them with DPO, observed by the callback. Before and
after it answers prompts that are not in the pairs; the model before reads all answers. A second run has its pairs in another
order. What it wrote is kept, and `natural.py` reads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import real_change
import real_pairs
import real_runs

from trl_sae_audit import Audit, LookaheadConfig, audit_preferences, load_dictionary

NAME = "real-prediction"
SIZES = {
    "train_pairs": (160, "pairs audited and trained on"),
    **real_change.MEASUREMENT,
    "per_step": (8, "pairs in an optimizer step"),
    "groups": (
        4,
        "of the audit's lookahead; 1 is cheaper, ranks alike and has no intervals; 0 for no lookahead",
    ),
}


def main() -> None:
    parser = real_runs.parser(__doc__)
    parser.set_defaults(seeds=[0])
    parser.add_argument("pairs", type=Path, help="preference pairs, as JSON lines")
    real_runs.add_sizes(parser, SIZES, 2e-5)
    parser.add_argument("--lora", action="store_true", help="train an adapter of rank 16")
    parser.add_argument(
        "--runs", type=int, default=1, help="2 for a second run with the pairs in another order"
    )
    parser.add_argument("--report", action="store_true", help="run nothing; report all cells that there are")
    arguments = parser.parse_args()
    name = arguments.name or NAME
    if not arguments.report:
        settings = {key: getattr(arguments, key) for key in (*SIZES, "learning_rate", "lora")}
        cells = [
            {"seed": seed, "run": run, **settings}
            for seed in arguments.seeds
            for run in range(arguments.runs)
        ]
        common.run_cells(name, cells, lambda cell: run_cell(arguments, name, cell))
    report(name, common.stored_cells(name))


def run_cell(arguments: argparse.Namespace, name: str, cell: common.Cell) -> Iterable[dict[str, Any]]:
    """One training: the scores before and during it, and what it changed."""
    model, tokenizer = real_runs.load_model(arguments.model)
    dictionary = load_dictionary(arguments.dictionary)
    pairs, prompts = split(arguments.pairs, tokenizer, cell)
    directory = directory_of(name, cell)
    args = real_runs.dpo_config(
        directory / "out",
        per_device_train_batch_size=cell["per_step"],
        learning_rate=cell["learning_rate"],
        max_length=256,
        num_train_epochs=1,
        seed=cell["seed"] + 1000 * cell["run"],
    )
    base, _ = real_runs.load_model(arguments.model)
    meter = real_change.Meter(directory, base, tokenizer, dictionary, prompts, cell)

    def make(path: Path) -> Audit:
        return audit_preferences(
            model,
            tokenizer,
            [real_pairs.in_chat_form(pair) for pair in pairs],
            dictionary,
            args=real_runs.dpo_config(
                directory / "out",
                per_device_train_batch_size=cell["per_step"],
                learning_rate=cell["learning_rate"],
                max_length=256,
            ),
            lookahead=LookaheadConfig(groups=cell["groups"]) if cell["groups"] else None,
            output_dir=path,
        )

    audit = meter.audit(make)
    meter.answers(base, "before")
    log = real_runs.train_dpo(
        model,
        tokenizer,
        [real_pairs.in_chat_form(pair) for pair in pairs],
        args,
        adapter=real_runs.ADAPTER if cell["lora"] else None,
        callbacks=[meter.callback(cell["run"])],
    )
    meter.stop("training, observed")
    after = meter.answers(model.eval(), f"after-{cell['run']}")
    learned = {
        "loss_first": log[0]["loss"],
        "loss_last": float(np.mean([step["loss"] for step in log[-3:]])),
        "margin_last": float(np.mean([step["rewards/margins"] for step in log[-3:]])),
    }
    for row in meter.compared(cell["run"], audit, after):
        yield {**row, **learned}


def split(
    path: Path, tokenizer: Any, cell: common.Cell
) -> tuple[list[real_pairs.Pair], list[dict[str, Any]]]:
    """The pairs, and the prompts held out, in chat form."""
    by_prompt = real_pairs.short_pairs(path, tokenizer, cell["prompt_tokens"], cell["answer_tokens"])
    pairs, left = real_pairs.draw_pairs(by_prompt, cell["train_pairs"], cell["held_out"], cell["seed"])
    return pairs, real_pairs.asked(pair["prompt"] for pair in left)


def directory_of(name: str, cell: common.Cell) -> Path:
    """Where a seed's audit, records and answers are kept, which its runs share."""
    return common.RAW / name / f"{'lora' if cell['lora'] else 'full'}-{cell['seed']}"


# What it shows


def report(name: str, rows: pd.DataFrame) -> None:
    """Write the numbers' part of docs/studies/real-prediction.md."""
    sections = []
    for _, cells in rows.groupby(["lora", "seed"], sort=False):
        first = cells.iloc[0]
        trained = "an adapter of rank 16" if first["lora"] else "all weights but the embeddings"
        steps = -(-first["train_pairs"] // first["per_step"])
        sections += [
            f"## {'LoRA' if first['lora'] else 'Full fine-tuning'}, seed {first['seed']}",
            f"{first['train_pairs']} real pairs in chat form, prompts of at most {first['prompt_tokens']} tokens, answers cut at {first['answer_tokens']}; DPO, {steps} AdamW "
            f"steps of {first['per_step']} pairs at {first['learning_rate']:g} (warm-up {real_runs.WARMUP} steps), {trained} trained, in float32. "
            f"The loss fell from {first['loss_first']:.3f} to {first['loss_last']:.3f}, the reward margin of the last three steps is {first['margin_last']:+.2f}.",
            real_change.described(first.to_dict()),
            common.markdown_table(real_change.score_table(directory_of(name, first.to_dict()), cells)),
            real_change.processor_time(first.to_dict()),
        ]
    title = "Prediction on a real instruct model" + ("" if name == NAME else f": {name}")
    common.write_report(name, title, sections, page=NAME)


if __name__ == "__main__":
    main()
