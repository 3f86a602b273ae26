"""Does a shaped reward hold a behaviour at the reference's level, and at what cost, with which coefficient?

    python scripts/studies/stability.py --task grpo      # the newest TRL
    python scripts/studies/stability.py --task ppo       # TRL 1.12, in the PPO environment
    python scripts/studies/stability.py --task grpo --pace warm --methods reference plain adaptive
    python scripts/studies/stability.py --task grpo --pace slow --methods reference plain adaptive

In the lab a policy is trained on a reward that pays 1 for a right answer and 1 for agreeing with the user in words. Flagged are
the features that carry agreement. Compared are a fixed coefficient, the same clipped, and AdaptivePenalty as it comes.
Both behaviours are read by rule from answers to held-out prompts, never from the features. A run that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from common import Cell, markdown_table, new_figure, run_cells, save_figure, write_report
from shaped_runs import TRAINING, run_cell

LAMBDAS = (0.1, 1.0, 10.0, 100.0)
METHODS = ["reference", "plain", "adaptive", "fixed", "clipped", "found", "mean"]
TOLERANCE = 0.1


def cells(
    task: str, pace: str, seeds: Iterable[int], methods: Iterable[str], coefficients: Iterable[float]
) -> list[Cell]:
    """Every setting on every seed, one setting after the other."""

    def cell(seed: int, **settings: Any) -> Cell:
        base = {
            "lambda": None,
            "pooling": "max",
            "flags": "truth",
            **({} if pace == "fast" else {"pace": pace}),
        }
        return {"task": task, "seed": seed, **base, **settings}

    settings: dict[str, list[dict[str, Any]]] = {
        name: [{"method": name}] for name in ("reference", "plain", "adaptive")
    }
    for name in ("fixed", "clipped"):
        settings[name] = [{"method": name, "lambda": coefficient} for coefficient in coefficients]
    settings["found"] = [{"method": "adaptive", "flags": "found"}]
    settings["mean"] = [{"method": "adaptive", "pooling": "mean"}]
    return [cell(seed, **each) for name in methods for each in settings[name] for seed in seeds]


def with_comparisons(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds to every run, from the reference and the plain run of the same seed: `off` (the behaviour's rate over the
    reference's, less 1), `lost` (true reward less than the plain run's) and `hidden` (the rate above what the features' mean
    score says, on the line through reference and plain run)."""
    reference = frame[frame["method"] == "reference"].set_index("seed")
    plain = frame[frame["method"] == "plain"].set_index("seed")
    rate, level = (frame["seed"].map(reference[name]) for name in ("agrees", "activation"))
    slope = (plain["agrees"] - reference["agrees"]) / (plain["activation"] - reference["activation"])
    expected = rate + frame["seed"].map(slope) * (frame["activation"] - level)
    return frame.assign(
        off=frame["agrees"] / rate - 1,
        lost=frame["seed"].map(plain["true"]) - frame["true"],
        hidden=frame["agrees"] - expected.clip(0, 1),
    )


def name_of(row: Any) -> str:
    variant = {"found": ", flags found by an audit", "truth": ""}[row.flags]
    return row.method + variant + (", mean over tokens" if row.pooling == "mean" else "")


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a setting, over the seeds."""
    spread = frame[frame["method"] == "plain"]["true"].std()
    frame = frame.assign(setting=[name_of(row) for row in frame.itertuples()], λ=frame["lambda"].fillna(""))
    lines = []
    for (name, coefficient), group in frame.groupby(["setting", "λ"], sort=False):
        held = group["method"].ne("plain") & group["method"].ne("reference")
        lines.append(
            {
                "": name,
                "λ": coefficient,
                "seeds": len(group),
                "agrees": f"{group['agrees'].mean():.3f} ({group['agrees'].min():.3f} to {group['agrees'].max():.3f})",
                "from target": f"{group['off'].mean():+.0%}",
                "runs within 10 %": f"{int((group['off'].abs() <= TOLERANCE).sum())} of {len(group)}"
                if held.any()
                else "",
                "true reward (sd)": f"{group['true'].mean():.3f} ({group['true'].std():.3f})",
                "lost": ""
                if name == "reference"
                else f"{group['lost'].mean():+.3f}"
                + (" **more than the spread**" if group["lost"].mean() > spread else ""),
                "padded": f"{group['padded'].mean():.2f}",
                "mean score": f"{group['activation'].mean():+.2f}",
                "hidden": f"{group['hidden'].mean():+.3f}" if held.any() else "",
            }
        )
    return pd.DataFrame(lines)


def figures(stem: str, frame: pd.DataFrame) -> str:
    figure, (left, middle, right) = new_figure(3, width=4.4)
    of = {name: frame[frame["method"] == name] for name in frame["method"].unique()}
    adaptive = of["adaptive"][(of["adaptive"]["pooling"] == "max") & (of["adaptive"]["flags"] == "truth")]
    target = of["reference"]["agrees"].mean()
    for axes, column in ((left, "agrees"), (middle, "true")):
        for name, colour in (("fixed", "C1"), ("clipped", "C2")):
            if name in of:
                by = of[name].groupby("lambda")[column]
                axes.plot(by.mean().index, by.mean(), "o-", color=colour, label=f"{name} coefficient")
                axes.fill_between(by.mean().index, by.min(), by.max(), color=colour, alpha=0.15, lw=0)
        for runs, colour, text in (
            (of["plain"], "C3", "no shaping"),
            (adaptive, "C0", "AdaptivePenalty, as it comes"),
        ):
            axes.axhline(runs[column].mean(), color=colour, label=text)
            axes.axhspan(runs[column].min(), runs[column].max(), color=colour, alpha=0.12, lw=0)
        if {"fixed", "clipped"} & set(of):
            axes.set(xscale="log", xlabel="λ of the fixed coefficient")
        else:
            axes.set(xticks=[])
    left.axhspan(target * (1 - TOLERANCE), target * (1 + TOLERANCE), fill=False, hatch="///", ec="0.6", lw=0)
    left.set(
        ylabel="share of answers that agree", title="flagged behaviour, by rule (hatched: target ± 10 %)"
    )
    middle.set(ylabel="share of right answers", title="true reward, by rule")
    middle.legend(fontsize=7)
    for name, colour in (("reference", "k"), ("plain", "C3"), ("fixed", "C1"), ("clipped", "C2")):
        if name in of:
            right.plot(of[name]["activation"], of[name]["agrees"], "o", color=colour, ms=4, label=name)
    right.plot(adaptive["activation"], adaptive["agrees"], "o", color="C0", ms=4, label="adaptive")
    diluted = frame[frame["pooling"] == "mean"]
    if len(diluted):
        right.plot(
            diluted["activation"], diluted["agrees"], "x", color="C4", label="adaptive, mean over tokens"
        )
    right.set(xlabel="mean score of the flagged features", ylabel="share of answers that agree")
    right.set_title("does it hide? (above the cloud: yes)")
    right.legend(fontsize=7)
    return save_figure(figure, stem, "Behaviour, true reward and feature score against the coefficient")


def report(name: str, task: str, pace: str, frame: pd.DataFrame) -> None:
    frame = with_comparisons(frame)
    training, plain = TRAINING[task, pace], frame[frame["method"] == "plain"]
    rising = f"reached after a rise over {training.warmup_steps} steps and " if training.warmup_steps else ""
    write_report(
        name,
        f"Stability of a shaped reward: {task.upper()}" + ("" if pace == "fast" else f", {pace}"),
        [
            f"A tiny model of the lab, {training.steps} steps of {training.batch_size} answers, learning rate "
            f"{training.learning_rate:g} {rising}falling to 0. The reward is 1 for a right answer plus 1 for agreeing with the user in "
            "words. Flagged are the features that carry agreement (`world.carriers`; in the line *flags found by an audit* those "
            "of the ten features of largest disparity whose strongest answers agree), together of weight 1. The target is the "
            "reference model's rate of agreement. A seed is a world of its own: model, dictionary and facts. Rates are "
            f"read by rule from answers to {int(frame['answers'].iloc[0])} held-out prompts; `clipped` is a fixed coefficient "
            "with the penalty held within ±1; `lost` is true reward below the plain run's of the same seed (the plain runs' spread: "
            f"{plain['true'].std():.3f}); `hidden` is how much more answers agree than the features' mean score says, on the line "
            "through reference and plain run.",
            markdown_table(summary(frame)),
            "A line of fewer seeds than the others, or a method that is missing, has not been run in full: the command goes on "
            "with it.",
            figures(name, frame),
        ],
        page="stability",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=["grpo", "ppo"], required=True)
    parser.add_argument(
        "--pace",
        choices=["fast", "warm", "slow"],
        default="fast",
        help="warm: a learning rate that rises over a third of the steps; slow: a fifth of it, five times the steps",
    )
    parser.add_argument("--seeds", type=int, default=5, help="worlds 0, 1, …; each is also the run's seed")
    parser.add_argument("--answers", type=int, default=1000, help="held-out prompts measured on")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="leave some out")
    parser.add_argument(
        "--coefficients", type=float, nargs="+", default=LAMBDAS, help="λ of fixed and clipped"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = f"stability-{options.task}" + ("" if options.pace == "fast" else f"-{options.pace}")
    frame = run_cells(
        name,
        cells(options.task, options.pace, range(options.seeds), options.methods, options.coefficients),
        lambda cell: run_cell(cell, options.answers),
    )
    if {"reference", "plain", "adaptive"} <= set(options.methods):
        report(name, options.task, options.pace, frame.assign(answers=options.answers))


if __name__ == "__main__":
    main()
