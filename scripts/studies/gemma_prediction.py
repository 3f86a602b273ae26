"""Does a score computed before training predict what training does to the features of a real model?

    python scripts/gemma.py runs/gemma/model
    python scripts/studies/gemma_prediction.py runs/gemma/model runs/gemma/sae pairs.jsonl

For every seed: some instructions are held out; the pairs of the others are audited, and the model is trained on them
with DPO, one epoch. Then every feature's change of mean activation is compared with each score: on the held-out pairs'
answers (on given text), and on sampled answers to the held-out instructions, which the model before training reads.

The lookahead takes the run's usual step (AdamW divides by the size of the gradients of mini-batches) as often as the run
has steps; the unrolled run walks to the end of the run in a few long steps. Where policy and reference are the same, swapping the
labels of a pair turns its gradient round, so the control needs no further gradient: it is the same lookahead with the
labels of every second mini-batch swapped. A second run differs in the order of the pairs alone: what a score cannot know.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import real_runs
import torch

from trl_sae_audit import audit_preferences, load_dictionary
from trl_sae_audit.audit.lookahead.generations import Generations, predict_in_generations
from trl_sae_audit.audit.lookahead.lookahead import Lookahead
from trl_sae_audit.audit.lookahead.unrolled import UnrolledRun
from trl_sae_audit.audit.result import Audit
from trl_sae_audit.audit.rewards import answer_ids
from trl_sae_audit.data.opener import iterate_rows
from trl_sae_audit.models.sampling import Sampling, sample_ids
from trl_sae_audit.verification.comparison import predictors_of, verify
from trl_sae_audit.verification.measured import MeasuredChange, answer_activations, sampled_change

BEST, SWAPPED = "unrolled change", "predicted change, labels swapped"
SECOND_RUN = "a second run"
SAMPLES = 4
"""Answers sampled to each held-out instruction."""


def main() -> None:
    parser = real_runs.parser(__doc__)
    parser.add_argument("pairs", type=Path, help="preference pairs, as JSON lines")
    parser.add_argument("--train_pairs", type=int, default=24, help="pairs audited and trained on")
    parser.add_argument("--per_step", type=int, default=2, help="pairs in an optimizer step")
    parser.add_argument("--held_out", type=int, default=20, help="pairs of other instructions, to measure on")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="leave longer instructions out")
    parser.add_argument(
        "--max_length", type=int, default=32, help="tokens at which prompt and answer are cut"
    )
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    arguments = parser.parse_args()
    name = arguments.name or "gemma-prediction"
    settings = {
        key: getattr(arguments, key)
        for key in ("train_pairs", "held_out", "per_step", "prompt_tokens", "max_length", "learning_rate")
    }
    cells = [{"seed": seed, **settings} for seed in arguments.seeds]
    results = common.run_cells(name, cells, lambda cell: run(arguments, name, cell))
    report(name, results, cells)


def run(arguments: argparse.Namespace, name: str, cell: common.Cell) -> Iterable[dict[str, Any]]:
    """One seed: scores, training, and what became of the features."""
    model, tokenizer = real_runs.load_model(arguments.model)
    dictionary = load_dictionary(arguments.dictionary)
    pairs, held_out = split(arguments.pairs, tokenizer, cell)
    with tempfile.TemporaryDirectory() as scratch:
        args = real_runs.dpo_config(
            scratch,
            per_device_train_batch_size=cell["per_step"],
            learning_rate=cell["learning_rate"],
            max_length=cell["max_length"],
            num_train_epochs=1,
            seed=cell["seed"],
        )
        audit = audit_preferences(
            model, tokenizer, pairs, dictionary, args=args, batch_size=8, lookahead=None
        )
        scores = predictors_of(audit) | swapped_attribution(audit)
        ahead = real_runs.usual_step(model, tokenizer, dictionary, pairs, held_out, args)
        unrolled = UnrolledRun(ahead, full_steps(cell))
        scores |= lookaheads(ahead, unrolled, len(pairs))

        prompts = [{"prompt": prompt} for prompt in dict.fromkeys(pair["prompt"] for pair in held_out)]

        def sampling(luck: int) -> Sampling:
            return Sampling(SAMPLES, cell["max_length"] - cell["prompt_tokens"], seed=luck)

        def written(after: Any, luck: int) -> MeasuredChange:
            return sampled_change(
                base, after, tokenizer, dictionary, prompts, sampling=sampling(luck), batch_size=48
            )

        def read(model: Any) -> Any:
            return answer_activations(model, tokenizer, dictionary, held_out, max_length=cell["max_length"])

        # with other random numbers than below, or both would share the noise of the answers before
        luck = 1000 + cell["seed"]
        asked = [answer_ids(tokenizer, row["prompt"], "")[0] for row in prompts]
        scores["predicted change in generations"] = predicted_of_samples(
            ahead, unrolled.steps, tokenizer, asked, sampling(luck)
        )
        base, _ = real_runs.load_model(arguments.model)
        with unrolled.moved():
            scores["unrolled change in generations"] = written(model, luck).change
        del ahead, unrolled
        before = read(base)
        log = real_runs.train_dpo(model, tokenizer, pairs, args)
        given, sampled = MeasuredChange("on given text", before, read(model)), written(model, cell["seed"])
        again, _ = real_runs.load_model(arguments.model)
        args.seed += 1000
        real_runs.train_dpo(again, tokenizer, pairs, args)
        second = (
            MeasuredChange("on given text", before, read(again)).change,
            written(again, 2000 + cell["seed"]).change,
        )
    rows: list[dict[str, Any]] = []
    for measured, other in zip((given, sampled), second, strict=True):
        found = verify(scores | {SECOND_RUN: other}, measured, seed=cell["seed"])
        found.features.to_parquet(features_file(name, cell["seed"], measured.kind), index=False)
        for row in found.table.to_dict("records"):
            rows.append(
                {
                    **{str(key): value for key, value in row.items()},
                    "target": measured.kind,
                    "ceiling": found.ceiling,
                    "features": len(found.features),
                    "prompts": len(measured),
                    "loss_first": log[0]["loss"],
                    "loss_last": float(np.mean([step["loss"] for step in log[-3:]])),
                    "margin_last": float(np.mean([step["rewards/margins"] for step in log[-3:]])),
                }
            )
    return rows


def split(path: Path, tokenizer: Any, cell: common.Cell) -> tuple[list[dict], list[dict]]:
    """Pairs to train on, and pairs of other instructions, at most two an instruction."""
    rows = [row.columns for row in iterate_rows(path) if row.columns is not None]
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        if len(tokenizer(row["prompt"])["input_ids"]) <= cell["prompt_tokens"]:
            pair = {key: row[key] for key in ("prompt", "chosen", "rejected")}
            by_prompt.setdefault(row["prompt"], []).append(pair)
    choose = random.Random(cell["seed"])
    prompts = sorted(by_prompt)
    choose.shuffle(prompts)
    held_out: list[dict] = []
    while len(held_out) < cell["held_out"] and prompts:
        own = by_prompt[prompts.pop()]
        held_out += choose.sample(own, min(2, len(own), cell["held_out"] - len(held_out)))
    pool = [pair for prompt in prompts for pair in by_prompt[prompt]]
    if len(pool) < cell["train_pairs"]:
        raise SystemExit(f"{len(pool)} pairs are left to train on, fewer than --train_pairs")
    return choose.sample(pool, cell["train_pairs"]), held_out


def swapped_attribution(audit: Audit) -> dict[str, np.ndarray]:
    """The attribution had half of the labels been swapped."""
    parts = audit.contributions(range(audit.dictionary.d_sae))
    half = len(parts) // 2
    return {"attribution, labels swapped": parts[:half].sum(0) - parts[half:].sum(0)}


def full_steps(cell: common.Cell) -> float:
    """Steps of the run, those of the warm-up counted by their learning rate."""
    return -(-cell["train_pairs"] // cell["per_step"]) - (real_runs.WARMUP + 1) / 2


def lookaheads(ahead: Lookahead, unrolled: UnrolledRun, n: int) -> dict[str, np.ndarray]:
    """Predicted changes of the mean activation over the whole run, on `n` pairs, in units of activation."""
    total, swapped = (
        {key: torch.zeros_like(value) for key, value in ahead.parameters.items()} for _ in range(2)
    )
    moments = ahead.new_moments()
    assert moments is not None
    for place, batch in enumerate(ahead.examples()):
        gradient, count = ahead.gradient([batch], moments)
        for key, value in gradient.items():
            total[key] += value * count / n
            swapped[key] += value * count / n * (-1) ** place
    batches = moments.result()
    directions = {
        "predicted change": ahead.rule.affine(total, ahead.parameters, batches).step(total),
        SWAPPED: ahead.rule.affine(swapped, ahead.parameters, batches).step(swapped),
    }
    found = {name: unrolled.steps * ahead.change_along(direction) for name, direction in directions.items()}
    found["unrolled change"] = ahead.change_after(unrolled.shift())
    return {name: value.double().cpu().numpy() for name, value in found.items()}


def predicted_of_samples(
    ahead: Lookahead, steps: float, tokenizer: Any, prompts: list[Any], sampling: Sampling
) -> np.ndarray:
    """Predicted change of the mean activation in generations, over the whole run, in units of activation."""
    answers = sample_ids(ahead.model, tokenizer, prompts, sampling, batch_size=48)
    batches = Generations(prompts, answers).batches(tokenizer, 16, ahead.dictionary.device)
    return (
        steps
        * predict_in_generations(ahead, batches)["predicted_change_in_generations"].double().cpu().numpy()
    )


def features_file(name: str, seed: int, kind: str) -> Path:
    """Where one seed's table of features goes, for the figure."""
    path = common.RAW / name / f"{kind.replace(' ', '-')}-{seed}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def frequent_r2(name: str, seeds: Iterable[int], kind: str, score: str) -> float:
    """Mean R² over the features whose mean activation before training is in the upper quarter."""
    found = []
    for seed in seeds:
        table = pd.read_parquet(features_file(name, seed, kind))
        table = table[table["before"] >= table["before"].quantile(0.75)]
        found.append(max(0.0, float(np.corrcoef(table[score], table["measured"])[0, 1])) ** 2)
    return float(np.mean(found))


def report(name: str, results: pd.DataFrame, cells: list[common.Cell]) -> None:
    """`docs/studies/NAME.md` and its figure."""
    seeds = [cell["seed"] for cell in cells]
    first = results[results["target"] == "on given text"].iloc[0]
    sections = [
        f"{len(seeds)} seeds; each: {cells[0]['train_pairs']} real preference pairs of instructions of at most "
        f"{cells[0]['prompt_tokens']} tokens, prompt and answer cut at {cells[0]['max_length']} tokens; DPO, one epoch of "
        f"AdamW steps of {cells[0]['per_step']} pairs at {cells[0]['learning_rate']:g} after a warm-up of {real_runs.WARMUP} steps, all weights but the embeddings (tied "
        f"with the head) trained, in float32. Measured on {cells[0]['held_out']} pairs of {first['prompts']} other instructions.",
        "R² is the share of the variance over features that the score explains (a score that has the sign wrong explains 0), ρ "
        "Spearman's rank correlation, precision the share of the 20 largest changes found with the right sign. Means over the "
        "seeds; in brackets the smallest and the largest seed. The ceiling is what a score that knows the change "
        "of all such texts could be expected to reach, given how few instructions it was measured on; a lookahead on these very texts "
        "may lie above it. *A second run* has its pairs in another order, and samples with other random numbers: no score can know more.",
    ]
    for kind in ("on given text", "in generations"):
        part = results[results["target"] == kind]
        sections += [
            f"## {kind.capitalize()}",
            f"{part['features'].mean():.0f} features on average; ceiling {part.groupby('seed')['ceiling'].first().mean():.2f}.",
            common.markdown_table(table_of(part, name, seeds, kind)),
        ]
    given = results[(results["target"] == "on given text") & (results["score"] != SECOND_RUN)]
    first_score = str(given.groupby("score")["r2"].mean().idxmax())
    best = given[given["score"] == first_score]["r2"]
    sections.insert(
        2,
        f"The goal was R² ≥ 0.8 on given text: `{first_score}` reaches it in {int((best >= 0.8).sum())} of {len(best)} runs "
        f"({', '.join(f'{value:.2f}' for value in best)}).",
    )
    sections += ["## Figure", figure(name, seeds)]
    sections += ["## Training", common.markdown_table(training_table(results))]
    common.write_report(name, "Prediction on Gemma 3 270M", sections, page="prediction")


def table_of(part: pd.DataFrame, name: str, seeds: list[int], kind: str) -> pd.DataFrame:
    rows = []
    for score, own in part.groupby("score"):
        row: dict[str, Any] = {"score": score, "_r2": own["r2"].mean()}
        for statistic, label in (("r2", "R²"), ("spearman", "ρ"), ("precision", "precision at 20")):
            values = own[statistic]
            row[label] = f"{values.mean():.2f} [{values.min():.2f}, {values.max():.2f}]"
        row["R² per seed, 95 % interval over instructions"] = "; ".join(
            f"{line.r2:.2f} [{line.r2_low:.2f}, {line.r2_high:.2f}]" for line in own.itertuples()
        )
        row["R², most active quarter"] = f"{frequent_r2(name, seeds, kind, str(score)):.2f}"
        rows.append(row)
    return pd.DataFrame(rows).sort_values("_r2", ascending=False).drop(columns="_r2")


def training_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row a seed: did the training do anything?"""
    first = results.groupby("seed").first().reset_index()
    return pd.DataFrame(
        {
            "seed": first["seed"],
            "loss, first step": first["loss_first"].map("{:.3f}".format),
            "loss, last three": first["loss_last"].map("{:.3f}".format),
            "reward margin, last three": first["margin_last"].map("{:+.3f}".format),
        }
    )


def figure(name: str, seeds: list[int]) -> str:
    """Predicted against measured change, a point a feature."""
    panels = (
        (BEST, "on given text"),
        ("attribution", "on given text"),
        ("unrolled change in generations", "in generations"),
    )
    drawing, axes = common.new_figure(len(panels), width=3.6)
    for axis, (score, kind) in zip(axes, panels, strict=True):
        for seed in seeds:
            table = pd.read_parquet(features_file(name, seed, kind))
            axis.scatter(
                table[score], table["measured"], s=4, alpha=0.35, label=f"seed {seed}", rasterized=True
            )
        axis.set_title(kind)
        axis.set_xlabel(f"{score}, before training")
        axis.set_ylabel("change of mean activation")
    axes[0].legend(markerscale=2)
    return common.save_figure(drawing, name, "Predicted against measured change of every feature")


if __name__ == "__main__":
    main()
