"""How well a coefficient holds a behaviour in a policy that is simulated: half a minute, no model.

    python scripts/studies/controller.py

A policy shows a behaviour with probability sigmoid(θ + what the prompt adds) and is trained by GRPO's formulae, advantages
divided by each group's spread, with Adam's momentum: 8 prompts of 8 answers a step. The reward pays 1 for the behaviour and 1 for
a right answer. Two features tell the behaviour almost surely. Three learners: one to whom the behaviour is a matter of two or
three steps, as in the stability study, and slower ones, as is usual.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import Cell, markdown_table, new_figure, run_cells, save_figure, write_report

from trl_sae_audit import AdaptivePenalty, FixedPenalty, Flag
from trl_sae_audit.shaping.penalties import Penalty

TARGET, PROMPTS, ANSWERS = 0.4, 8, 8
LEARNERS = ((0.4, 24), (0.1, 100), (0.03, 300))
METHODS = ("none", "fixed, half", "fixed, exact", "fixed, double", "adaptive")
EXACT = 0.5  # the two kinds of answers are two score units apart, and the reward pays 1


def penalty_of(method: str) -> Penalty:
    factor = {"none": 0.0, "fixed, half": 0.5, "fixed, exact": 1.0, "fixed, double": 2.0}
    return AdaptivePenalty() if method == "adaptive" else FixedPenalty(EXACT * factor[method])


def answers(rate: float, prompts: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Whether each answer shows it, the probability that it does, its scores and its reward."""
    each = np.log(rate / (1 - rate)) + rng.normal(0, 1, (prompts, 1))
    chance = 1 / (1 + np.exp(-each))
    shows = rng.random((prompts, ANSWERS)) < chance
    right = rng.random((prompts, ANSWERS)) < np.where(rng.random((prompts, 1)) < 0.3, 0.3, 0.97)
    scores = 2.0 * shows[..., None] - 0.8 + rng.normal(0, 0.15, (prompts, ANSWERS, 2))
    return shows, chance, scores, shows + 1.0 * right


def simulate(cell: Cell) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(cell["seed"])
    penalty = penalty_of(cell["method"])
    penalty.bind([Flag("simulated", 0, "it", weight=0.5), Flag("simulated", 1, "it", weight=0.5)])

    def cost(scores: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        flat = torch.tensor(scores.reshape(-1, 2))
        penalty.begin_batch()
        off = penalty(flat).numpy().reshape(rewards.shape)
        penalty.end_batch(flat, torch.tensor(rewards.ravel()))
        return off

    *_, scores, rewards = answers(TARGET, 128, rng)
    cost(scores, rewards)  # what learn_from does
    theta, first, second, rates = np.log(TARGET / (1 - TARGET)), 0.0, 0.0, []
    for step in range(cell["steps"]):
        rate = 1 / (1 + np.exp(-theta))
        shows, chance, scores, rewards = answers(rate, PROMPTS, rng)
        shaped = rewards - cost(scores, rewards)
        advantages = shaped - shaped.mean(1, keepdims=True)
        advantages /= shaped.std(1, keepdims=True) + 1e-4
        gradient = np.mean(advantages * (shows - chance))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        moved = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        theta = np.clip(theta + cell["speed"] * (1 - step / cell["steps"]) * moved, -8, 8)
        rates.append(round(float(rate), 4))
    yield {"rates": rates, "end": float(np.mean(rates[-max(2, len(rates) // 12) :]))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    frame = run_cells(
        "controller",
        [
            {"speed": speed, "steps": steps, "method": method, "seed": seed}
            for speed, steps in LEARNERS
            for method in METHODS
            for seed in range(20)
        ],
        simulate,
    )
    grouped = frame.groupby(["steps", "method"], sort=False)["end"]
    table = grouped.agg(["mean", "std", "min", "max"]).round(3).reset_index()
    figure, axes = new_figure(len(LEARNERS), width=4.0)
    for axis, (_, steps) in zip(axes, LEARNERS, strict=True):
        for method, colour in zip(METHODS, ("C3", "C4", "C1", "C5", "C0"), strict=True):
            runs = frame[(frame["steps"] == steps) & (frame["method"] == method)]
            curves = np.array(runs["rates"].tolist())
            axis.plot(np.median(curves, 0), color=colour, label=method)
            axis.fill_between(
                range(steps), *np.quantile(curves, [0.1, 0.9], 0), color=colour, alpha=0.15, lw=0
            )
        axis.axhspan(0.9 * TARGET, 1.1 * TARGET, fill=False, hatch="///", ec="0.6", lw=0)
        axis.set(title=f"{steps} steps", xlabel="step", ylabel="share that shows it", ylim=(0, 1))
    axes[0].legend(fontsize=7)
    text = "The behaviour's rate over the steps, median and 80 % of 20 runs, for three learners"
    write_report(
        "controller",
        "A coefficient and a simulated policy",
        [
            " ".join((__doc__ or "").split("\n\n")[-1].split()),
            "`end` is the rate over the last twelfth of the steps, over 20 seeds; the target is 0.4. A fixed coefficient is named by "
            "what it takes off of what the reward pays for the behaviour.",
            markdown_table(table),
            save_figure(figure, "controller", text),
        ],
        page="stability",
    )


if __name__ == "__main__":
    main()
