"""What does DPO on real pairs change in what a real instruct model writes, and which score said so?

    python scripts/studies/real_prediction.py runs/smol/model runs/smol/sae pairs.jsonl
    python scripts/studies/natural.py runs/smol/model pairs.jsonl

Real pairs in chat form are audited by default, and the model is trained on them with DPO, observed by the callback. Before and
after it answers prompts that are not in the pairs; the model before reads all answers. A second run has its pairs in another
order. What it wrote is kept, and `natural.py` reads it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import real_pairs
import real_runs
from peft import LoraConfig

from trl_sae_audit import (
    Audit,
    FeatureAttributionCallback,
    LookaheadConfig,
    RunRecord,
    audit_preferences,
    load_dictionary,
)
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.verification.comparison import verify
from trl_sae_audit.verification.measured import (
    AnswerActivations,
    MeasuredChange,
    read_answers,
    sample_answers,
)

NAME = "real-prediction"
LIVE = ("generation_drift", "selection", "attribution")
AUDITED = (
    "effect_size",
    "predicted_change_in_generations",
    "predicted_frequency_change",
    "selection",
    "projection_difference",
    "disparity",
    "mean_activation_difference",
    "attribution",
)
SECOND_RUN = "a second run"
ADAPTER = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
SIZES = {
    "train_pairs": (160, "pairs audited and trained on"),
    "held_out": (45, "prompts that no pair has, to measure on"),
    "prompt_tokens": (64, "leave longer prompts out"),
    "answer_tokens": (48, "tokens at which answers are cut, of pairs and sampled"),
    "answers": (6, "sampled to each held-out prompt"),
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
    for name, (default, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
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
    clock = Clock()
    audit = audit_preferences(
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
        output_dir=directory / "audit",
    )
    clock.stop("audit")

    def write(writer: Any, when: str) -> AnswerActivations:
        return answers_of(directory / f"{when}.npz", writer, base, tokenizer, dictionary, prompts, cell)

    base, _ = real_runs.load_model(arguments.model)
    before = write(base, "before")
    clock.stop("answers before")
    callback = FeatureAttributionCallback(
        dictionary,
        output_dir=directory / f"record-{cell['run']}",
        overwrite=True,
        generations=Sampling(answers=4, max_new_tokens=cell["answer_tokens"], seed=11),
        generation_prompts=prompts,
        generation_steps=-(-len(pairs) // cell["per_step"]),
    )
    log = real_runs.train_dpo(
        model,
        tokenizer,
        [real_pairs.in_chat_form(pair) for pair in pairs],
        args,
        adapter=ADAPTER if cell["lora"] else None,
        callbacks=[callback],
    )
    clock.stop("training, observed")
    after = write(model.eval(), f"after-{cell['run']}")
    clock.stop("answers after")
    record = RunRecord.load(directory / f"record-{cell['run']}")
    yield from compared(audit, record, MeasuredChange("in generations", before, after), log, clock.seconds)


def compared(
    audit: Audit,
    record: RunRecord,
    change: MeasuredChange,
    log: Sequence[dict[str, float]],
    seconds: dict[str, float],
) -> Iterable[dict[str, Any]]:
    """A row a score."""
    before, live = (each.features().set_index("feature").sort_index() for each in (audit, record))
    scores = {f"audit: {name}": before[name] for name in AUDITED if name in before} | {
        f"live: {name}": live[name] for name in LIVE
    }
    found = verify(
        {name: np.nan_to_num(values.to_numpy(np.float64)) for name, values in scores.items()}, change
    )
    for row in found.table.to_dict("records"):
        yield {
            **{str(key): value for key, value in row.items()},
            "ceiling": found.ceiling,
            "split_half": split_half(change),
            "features": len(found.features),
            "prompts": len(change),
            "loss_first": log[0]["loss"],
            "loss_last": float(np.mean([step["loss"] for step in log[-3:]])),
            "margin_last": float(np.mean([step["rewards/margins"] for step in log[-3:]])),
            "seconds": seconds,
        }


def split_half(change: MeasuredChange, draws: int = 100) -> float:
    """Reliability of the measured change: the mean correlation between two random halves of the prompts over the active features,
    made that of all prompts by Spearman and Brown's formula."""
    active, n = change.active, len(change)
    random = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        half = np.zeros(n)
        half[random.permutation(n)[: n // 2]] = 1
        one, other = change.resampled(np.stack([half, 1 - half]))[:, active]
        found.append(np.corrcoef(one, other)[0, 1])
    mean = float(np.mean(found))
    return 2 * mean / (1 + mean)


def split(
    path: Path, tokenizer: Any, cell: common.Cell
) -> tuple[list[real_pairs.Pair], list[dict[str, Any]]]:
    """The pairs, and the prompts held out, in chat form."""
    by_prompt = real_pairs.short_pairs(path, tokenizer, cell["prompt_tokens"], cell["answer_tokens"])
    pairs, left = real_pairs.draw_pairs(by_prompt, cell["train_pairs"], cell["held_out"], cell["seed"])
    asked = dict.fromkeys(pair["prompt"] for pair in left)
    return pairs, [{"prompt": [{"role": "user", "content": prompt}]} for prompt in asked]


def directory_of(name: str, cell: common.Cell) -> Path:
    """Where a seed's audit, records and answers are kept, which its runs share."""
    return common.RAW / name / f"{'lora' if cell['lora'] else 'full'}-{cell['seed']}"


def answers_of(
    path: Path,
    writer: Any,
    reader: Any,
    tokenizer: Any,
    dictionary: Any,
    prompts: list[dict[str, Any]],
    cell: common.Cell,
) -> AnswerActivations:
    """What `writer` answers, as `reader` reads it; kept in `path`, and the texts beside it."""
    if path.exists():
        kept = np.load(path)
        return AnswerActivations(
            kept["sums"], kept["tokens"], tuple(kept["prompts"].tolist()), kept["active"]
        )
    sampling = Sampling(cell["answers"], cell["answer_tokens"], seed=5)
    answered = sample_answers(writer, tokenizer, prompts, sampling=sampling, batch_size=48)
    found = read_answers(reader, tokenizer, dictionary, answered, batch_size=32)
    rows = [
        {
            "prompt": prompt,
            "answer": tokenizer.decode(answer, skip_special_tokens=True),
            "tokens": len(answer),
            "ended": tokenizer.eos_token_id in answer,
        }
        for prompt, _, answer in answered
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    np.savez(path, sums=found.sums, tokens=found.tokens, prompts=np.array(found.prompts), active=found.active)
    return found


def load_answers(path: Path) -> AnswerActivations:
    kept = np.load(path)
    return AnswerActivations(kept["sums"], kept["tokens"], tuple(kept["prompts"].tolist()), kept["active"])


class Clock:
    """Processor seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.process_time()

    def stop(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part], self._began = round(now - self._began, 1), now


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
            f"steps of {first['per_step']} pairs at {first['learning_rate']:g} (warm-up {real_runs.WARMUP} steps), {trained} trained, in float32. Measured on {first['answers']} answers of at most "
            f"{first['answer_tokens']} tokens to each of {first['prompts']} other prompts; {first['features']} features are active in them. "
            f"The loss fell from {first['loss_first']:.3f} to {first['loss_last']:.3f}, the reward margin of the last three steps is {first['margin_last']:+.2f}.",
            f"Ceiling, the R² to expect of a perfect score with so few prompts: {first['ceiling']:.2f}; reliability by split halves of the prompts: {first['split_half']:.2f}. "
            "In brackets 95 % intervals over prompts.",
            common.markdown_table(score_table(name, cells)),
            "Processor time: "
            + ", ".join(f"{part} {value / 60:.1f} min" for part, value in first["seconds"].items())
            + ".",
        ]
    title = "Prediction on a real instruct model" + ("" if name == NAME else f": {name}")
    common.write_report(name, title, sections, page=NAME)


def score_table(name: str, cells: pd.DataFrame) -> pd.DataFrame:
    """A line a score of the first run, the largest R² first; beside them a second run's change, if there was one."""
    table: list[dict[Any, Any]] = cells[cells["run"] == 0].to_dict("records")
    if (cells["run"] == 1).any():
        table += second_run(name, cells)
    lines = [
        {
            "score": row["score"],
            "R²": f"{row['r2']:.3f} [{row['r2_low']:.3f}, {row['r2_high']:.3f}]",
            "R² / ceiling": f"{row['r2'] / row['ceiling']:.2f}" if row["ceiling"] > 0 else "",
            "ρ": f"{row['spearman']:+.2f} [{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]",
            "top 20 found": f"{row['precision']:.0%}",
        }
        for row in sorted(table, key=lambda row: -row["r2"])
    ]
    return pd.DataFrame(lines)


def second_run(name: str, cells: pd.DataFrame) -> list[dict[Any, Any]]:
    """How well the change in the second run predicts that in the first; both are measured on the same prompts, with other weights."""
    directory = directory_of(name, cells.iloc[0].to_dict())
    before, first, second = (
        load_answers(directory / f"{when}.npz") for when in ("before", "after-0", "after-1")
    )
    one, other = (MeasuredChange("in generations", before, after) for after in (first, second))
    found = verify({SECOND_RUN: other.change}, one)
    table = found.table[found.table["score"] == SECOND_RUN]
    return table.assign(ceiling=found.ceiling).to_dict("records")


if __name__ == "__main__":
    main()
