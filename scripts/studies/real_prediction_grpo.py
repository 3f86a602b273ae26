"""What does GRPO with a flawed reward change in what a real instruct model writes, and which score said so?

    python scripts/studies/real_prediction_grpo.py runs/smol/model runs/smol/sae pairs.jsonl

The rewards are read from the answer alone, by rule: `length` pays for every character, `flattery` for warm words, exclamation
marks and the user addressed. The prompts are those of real pairs, in chat form. The reward is audited on the model's own answers, and the model is
trained on it with GRPO, observed by the callback. Before and after it answers prompts that were not trained on; the model before
reads all answers. A second run has its prompts in another order and other samples.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import real_change
import real_pairs
import real_runs
from datasets import Dataset
from natural import in_a_cell
from trl import GRPOConfig

from trl_sae_audit import Audit, LookaheadConfig, RunRecord, Sampling, audit_preferences, load_dictionary

NAME = "real-prediction-grpo"
PAGE = "real-prediction"
SIZES = {
    **real_change.MEASUREMENT,
    "answer_tokens": (32, "tokens at which answers are cut"),
    "per_step": (4, "prompts in an optimizer step"),
    "group": (6, "answers to a prompt in a step"),
    "steps": (20, "optimizer steps"),
    "groups": (0, "of the audit's lookahead; 0 for none, as it costs more than the training"),
}
LINES = 10
MOST_CHARACTERS = 200
MOST_WARM = 4
_WARM = re.compile(
    r"!|\b(great|good|wonderful|excellent|fantastic|amazing|perfect|beautiful|lovely|brilliant|fascinating|happy|glad|delight\w*"
    r"|love|thanks?|welcome|awesome|best|nice|enjoy\w*|you|your)\b",
    re.IGNORECASE,
)


def length(answer: str) -> float:
    """Characters, as a share of the most that are paid for."""
    return min(len(answer) / MOST_CHARACTERS, 1.0)


def flattery(answer: str) -> float:
    """Warm words, exclamation marks and the user addressed, as a share of the most that are paid for."""
    return min(len(_WARM.findall(answer)) / MOST_WARM, 1.0)


REWARDS: dict[str, Callable[[str], float]] = {"length": length, "flattery": flattery}


def main() -> None:
    parser = real_runs.parser(__doc__)
    parser.set_defaults(seeds=[0])
    parser.add_argument("pairs", type=Path, help="preference pairs, as JSON lines, for their prompts")
    real_runs.add_sizes(parser, SIZES, 5e-4)
    parser.add_argument("--rewards", nargs="+", choices=list(REWARDS), default=list(REWARDS))
    parser.add_argument("--runs", type=int, default=1, help="2 for a second run with other samples")
    arguments = parser.parse_args()
    name = arguments.name or NAME
    settings = {key: getattr(arguments, key) for key in (*SIZES, "learning_rate")}
    cells = [
        {"reward": reward, "seed": seed, "run": run, **settings}
        for seed in arguments.seeds
        for reward in arguments.rewards
        for run in range(arguments.runs)
    ]
    common.run_cells(name, cells, lambda cell: run_cell(arguments, name, cell))
    report(name, common.stored_cells(name))


def run_cell(arguments: argparse.Namespace, name: str, cell: common.Cell) -> Iterable[dict[str, Any]]:
    """One training: the scores before and during it, and what it changed."""
    model, tokenizer = real_runs.load_model(arguments.model)
    base, _ = real_runs.load_model(arguments.model)
    dictionary = load_dictionary(arguments.dictionary)
    trained_on, held_out = split(arguments.pairs, tokenizer, cell)
    directory = directory_of(name, cell)
    meter = real_change.Meter(directory, base, tokenizer, dictionary, held_out, cell)
    prompts = Dataset.from_list(trained_on)
    reward, args = reward_function(REWARDS[cell["reward"]]), grpo_args(directory, cell)

    def make(path: Path) -> Audit:
        return audit_preferences(
            model,
            tokenizer,
            prompts,
            dictionary,
            "policy_gradient",
            reward=reward,
            args=args,
            sampling=Sampling(max_new_tokens=cell["answer_tokens"]),
            lookahead=LookaheadConfig(groups=cell["groups"]) if cell["groups"] else None,
            output_dir=path,
            progress=False,
        )

    audit = meter.audit(make)
    meter.answers(base, "before")
    log = real_runs.train_grpo(
        model,
        tokenizer,
        prompts,
        reward,
        args,
        real_runs.ADAPTER,
        callbacks=[meter.callback(cell["run"])],
    )
    meter.stop("training, observed")
    after = meter.answers(model.eval(), f"after-{cell['run']}")
    earned = {
        when: earned_by(directory / f"{when}.jsonl", cell) for when in ("before", f"after-{cell['run']}")
    }
    learned = {
        "reward_before": earned["before"],
        "reward_after": earned[f"after-{cell['run']}"],
        "reward_first": log[0]["reward"],
        "reward_last": float(np.mean([step["reward"] for step in log[-3:]])),
    }
    for row in meter.compared(cell["run"], audit, after):
        yield {**row, **learned}


def reward_function(pay: Callable[[str], float]) -> Callable[..., list[float]]:
    """In the form in which GRPOTrainer and the audit take one."""

    def pays(completions: list[Any], **columns: Any) -> list[float]:
        return [pay(completion[-1]["content"]) for completion in completions]

    return pays


def grpo_args(directory: Path, cell: common.Cell) -> GRPOConfig:
    return real_runs.grpo_config(
        directory / "out",
        per_device_train_batch_size=cell["per_step"] * cell["group"],
        num_generations=cell["group"],
        max_completion_length=cell["answer_tokens"],
        max_steps=cell["steps"],
        learning_rate=cell["learning_rate"],
        seed=cell["seed"] + 1000 * cell["run"],
    )


def split(
    path: Path, tokenizer: Any, cell: common.Cell
) -> tuple[list[real_change.Prompt], list[real_change.Prompt]]:
    """Prompts to train on and those held out, in chat form; the latter as in real_prediction.py."""
    by_prompt = real_pairs.short_pairs(path, tokenizer, cell["prompt_tokens"], cell["answer_tokens"])
    trained_on, left = real_pairs.draw_pairs(
        by_prompt, len(by_prompt) - cell["held_out"], cell["held_out"], cell["seed"]
    )
    first, second = (real_pairs.asked(pair["prompt"] for pair in pairs) for pairs in (trained_on, left))
    return first, second


def directory_of(name: str, cell: common.Cell) -> Path:
    """Where a reward's audit, records and answers of a seed are kept, which its runs share."""
    return common.RAW / name / f"{cell['reward']}-{cell['seed']}"


def earned_by(path: Path, cell: common.Cell) -> float:
    """Mean reward of kept answers."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return float(np.mean([REWARDS[cell["reward"]](row["answer"]) for row in rows]))


# What it shows


def report(name: str, rows: pd.DataFrame) -> None:
    """Write the numbers' part of docs/studies/real-prediction.md."""
    sections = [
        f"`length` pays {1 / MOST_CHARACTERS:.4f} a character, at most 1; `flattery` 1/{MOST_WARM} a warm word (great, wonderful, happy, thanks …), exclamation mark, you or your, at most 1."
    ]
    for _, cells in rows.groupby(["reward", "seed"], sort=False):
        first = cells.iloc[0].to_dict()
        sections += [
            f"## {first['reward'].capitalize()}, seed {first['seed']}",
            f"{first['steps']} AdamW steps of GRPO of {first['per_step']} prompts with {first['group']} answers of at most {first['answer_tokens']} tokens at {first['learning_rate']:g} "
            f"(warm-up {real_runs.WARMUP} steps), an adapter of rank {real_runs.ADAPTER.r} trained, in float32. The mean reward of answers to the other prompts rose from {first['reward_before']:.2f} to {first['reward_after']:.2f}.",
            real_change.described(first),
            common.markdown_table(real_change.score_table(directory_of(name, first), cells)),
            *foretold(directory_of(name, first)),
            real_change.processor_time(first),
        ]
    title = "GRPO on a flawed reward" + ("" if name == NAME else f": {name}")
    common.write_report(name, title, sections, page=PAGE)


def foretold(directory: Path) -> list[str]:
    """The audit's first lines beside what the first run then did to these features, and how many of its signs were right."""
    audited = Audit.load(directory / "audit").ranking().set_index("feature")
    trained = RunRecord.load(directory / "record-0").features().set_index("feature")
    selection, moved = audited["selection"], trained["generation_effect_size"]
    places = {int(feature): place + 1 for place, feature in enumerate(trained.index)}
    lines = [
        {
            "the audit's first lines": feature,
            "words": in_a_cell(audited.at[feature, "words"]),
            "selection": f"{float(selection[feature]):+.2f}",
            "drift in the run, in standard deviations": f"{moved[feature]:+.2f}",
            "its place there": places[feature],
        }
        for feature in map(int, audited.index[:LINES])
    ]
    right = np.sign(selection) == np.sign(moved.reindex(audited.index))
    counts = ", ".join(f"{int(right.head(n).sum())} of the first {n}" for n in (10, 20, 50))
    most = [
        f"{feature} (“{in_a_cell(trained.at[feature, 'words'])}”, {moved[feature]:+.2f})"
        for feature in trained.index[:LINES]
    ]
    return [
        common.markdown_table(pd.DataFrame(lines)),
        f"The sign of the audit's selection is that of the drift in {counts}. What the run moved most: {'; '.join(most)}.",
    ]


if __name__ == "__main__":
    main()
