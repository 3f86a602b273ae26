"""Which score, computed before training, predicts what a DPO run does to the features?

    python scripts/studies/prediction.py

In the lab: worlds of five seeds, four planted behaviours each. Scores of an audit, against the change of every feature's mean
activation in the run, as the trained model reads held-out answers and as it writes its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import Cell, markdown_table, new_figure, save_figure, write_report
from lab_scores import (
    NAMES,
    along_random_directions,
    audited,
    planted_pairs,
    scores_of,
    study,
    swapped,
)
from transformers import TrainerCallback

from trl_sae_audit import load_dictionary, verify
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.training import dpo_arguments, train_dpo
from trl_sae_audit.realised import (
    AnswerActivations,
    RealisedChange,
    answer_activations,
    sampled_activations,
)
from trl_sae_audit.sampling import Sampling
from trl_sae_audit.statistics import bootstrap_interval

NAME = "prediction"
PLANTS = ("agrees", "padded", "marked", "echoes")
STRENGTH, STEPS = 0.7, 40
OVER_TRAINING = (10, 40, 160)
HELD_OUT_PAIRS, HELD_OUT_PROMPTS = 250, 500
WRITING = Sampling(answers=4, max_new_tokens=56, seed=2)
READ, WRITTEN = "teacher-forced", "sampled"
CONTROLLED = "agrees"
SWAPPED, SECOND_RUN, RANDOM_DIRECTIONS = ", labels swapped", "a second run", "attribution, random directions"
BATCH = 64


def cells(seeds: int) -> list[Cell]:
    """One run a world, all seeds and behaviours early; then in two worlds a longer one, looked at three times."""
    runs = [
        {"seed": seed, "plant": PLANTS[(seed + shift) % len(PLANTS)], "steps": [STEPS]}
        for shift in range(len(PLANTS))
        for seed in range(seeds)
    ]
    longer = [
        {"seed": seed, "plant": "agrees", "steps": list(OVER_TRAINING)} for seed in range(min(seeds, 2))
    ]
    return runs + longer


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    """Scores before training, a run, and how well each score predicted it at each length."""
    world = build_world(cell["seed"], progress=False)
    dictionary = load_dictionary(world.dictionary_path)
    pairs = planted_pairs(world, cell["plant"], STRENGTH)
    meter = _meter(cell["seed"])
    changes = meter.changes(pairs, cell["steps"], seed=0)
    short = cell["steps"] == [STEPS]
    controlled = short and cell["plant"] == CONTROLLED
    second = meter.changes(pairs, [STEPS], seed=1)[STEPS] if controlled else []
    for steps in cell["steps"]:
        audit = audited(world, pairs, f"{cell['plant']}-{STRENGTH}", dictionary, steps)
        scores = scores_of(audit) | {RANDOM_DIRECTIONS: along_random_directions(audit, cell["seed"])}
        if controlled:
            others = swapped(pairs, cell["seed"])
            control = audited(world, others, f"{cell['plant']}-swapped", dictionary, steps)
            scores |= {name + SWAPPED: value for name, value in scores_of(control).items()}
        for place, change in enumerate(changes[steps]):
            extra = {SECOND_RUN: second[place].change} if second else {}
            found = verify(scores | extra, change, draws=200)
            for row in found.table.to_dict("records"):
                yield {
                    "run_steps": steps,
                    "target": change.kind,
                    "ceiling": found.ceiling,
                    "features": len(found.features),
                    **{str(key): value for key, value in row.items()},
                }


@lru_cache(maxsize=1)
def _meter(seed: int) -> Meter:
    return Meter(build_world(seed, progress=False))


class Meter:
    """Measures what runs in a world change; what the model before does is measured once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.dictionary = load_dictionary(world.dictionary_path)
        self.before = world.model()
        seed = world.config.seed
        self.pairs = world.preferences({}, HELD_OUT_PAIRS, 300 + seed, split="heldout")
        self.prompts = world.prompts(HELD_OUT_PROMPTS, 400 + seed, split="heldout")
        self.read_before = self._reads(self.before)
        self.written_before = self._writes(self.before)

    def changes(self, pairs: Any, lengths: list[int], seed: int) -> dict[int, list[RealisedChange]]:
        """One run as long as the longest of `lengths`, looked at after each: reading and writing."""
        kept = _Snapshots(lengths)
        with tempfile.TemporaryDirectory() as scratch:
            train_dpo(self.world, pairs, dpo_arguments(scratch, max(lengths), seed), callbacks=[kept])
        return {steps: self._measured(kept.states[steps]) for steps in lengths}

    def _measured(self, state: dict[str, torch.Tensor]) -> list[RealisedChange]:
        after = self.world.model()
        after.load_state_dict(state)
        after.eval()
        return [
            RealisedChange(READ, self.read_before, self._reads(after)),
            RealisedChange(WRITTEN, self.written_before, self._writes(after)),
        ]

    def _reads(self, model: Any) -> AnswerActivations:
        return answer_activations(model, self.world.tokenizer, self.dictionary, self.pairs, batch_size=BATCH)

    def _writes(self, model: Any) -> AnswerActivations:
        return sampled_activations(
            model,
            self.before,
            self.world.tokenizer,
            self.dictionary,
            self.prompts,
            sampling=WRITING,
            batch_size=250,
        )


class _Snapshots(TrainerCallback):
    """Keeps the weights after some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = set(steps)
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.states[state.global_step] = {
                name: value.detach().clone() for name, value in model.state_dict().items()
            }


# What it shows

ORDER = [
    *NAMES.values(),
    *(name + SWAPPED for column, name in NAMES.items()),
    RANDOM_DIRECTIONS,
    "random",
    SECOND_RUN,
]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a score: mean over the worlds of each statistic with its interval, for reading and writing."""
    lines = []
    for score in [name for name in ORDER if name in set(rows["score"])]:
        line = {"score": score}
        for target, heading in ((READ, "reading"), (WRITTEN, "writing")):
            part = rows[(rows["score"] == score) & (rows["target"] == target)]
            for statistic, label in (("r2", "R²"), ("spearman", "ρ"), ("precision", "top 20")):
                interval = bootstrap_interval(part[statistic].to_numpy())
                shown = f"{interval.estimate:.2f}"
                if statistic == "r2":
                    shown += (
                        f" ({interval.low:.2f} to {interval.high:.2f})" if len(part) > 1 else " (one world)"
                    )
                line[f"{heading}: {label}"] = shown
        lines.append(line)
    return pd.DataFrame(lines)


def leads(rows: pd.DataFrame, best: dict[str, str]) -> pd.DataFrame:
    """By how much the best score is ahead of others in the same worlds, and how often."""
    lines = []
    for target, heading in ((READ, "reading"), (WRITTEN, "writing")):
        wide = rows[rows["target"] == target].pivot_table(
            index=["seed", "plant"], columns="score", values="r2"
        )
        ours = wide[best[target]]
        others = [
            "disparity",
            "mean activation difference",
            "attribution",
            "activation attribution",
            best[target].replace("rehearsal", "lookahead"),
            best[target] + SWAPPED,
        ]
        for other in others:
            gap = (ours - wide[other]).dropna().to_numpy()
            interval = bootstrap_interval(gap)
            lines.append(
                {
                    "": heading,
                    f"R² of {best[READ].split(',')[0]}, less that of": other,
                    "mean over worlds": f"{interval.estimate:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"
                    if len(gap) > 1
                    else f"{interval.estimate:+.2f}",
                    "worlds in which it is ahead": f"{(gap > 0).sum()} of {len(gap)}",
                }
            )
    return pd.DataFrame(lines)


def by_world(rows: pd.DataFrame, target: str, scores: list[str]) -> pd.DataFrame:
    """R² in every world, with its interval over prompts, and the most that could be reached."""
    lines = []
    for _, world in rows[rows["target"] == target].groupby(["seed", "plant"], sort=True):
        by_score, first = world.set_index("score"), world.iloc[0]
        line: dict[str, Any] = {"world": f"{first['plant']}, seed {first['seed']}"}
        for score in [name for name in scores if name in by_score.index]:
            value, low, high = by_score.loc[score, ["r2", "r2_low", "r2_high"]].to_numpy(np.float64)
            line[score] = f"{value:.2f} ({low:.2f} to {high:.2f})"
        line["slope of the first"] = f"{float(world[world['score'] == scores[0]]['slope'].iloc[0]):.2f}"
        line["a perfect score"] = f"{float(first['ceiling']):.2f}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def over_training(rows: pd.DataFrame) -> pd.DataFrame:
    """R² by length of the run, mean over its worlds."""
    shown = [name for name in NAMES.values() if name in set(rows["score"])]
    lines = []
    for score in shown:
        line = {"score": score}
        for target, heading in ((READ, "reading"), (WRITTEN, "writing")):
            for steps in OVER_TRAINING:
                part = rows[
                    (rows["score"] == score) & (rows["target"] == target) & (rows["run_steps"] == steps)
                ]
                line[f"{heading}, {steps} steps"] = f"{part['r2'].mean():.2f}"
        lines.append(line)
    return pd.DataFrame(lines)


def figure(rows: pd.DataFrame) -> str:
    """R² of every score in every world, reading and writing."""
    scores = [name for name in ORDER if name in set(rows["score"]) and SWAPPED not in name]
    scores += [name + SWAPPED for name in ("rehearsal, reading", "rehearsal, writing")]
    drawing, axes = new_figure(2, width=5.2, height=4.2)
    for axis, target, title in zip(axes, (READ, WRITTEN), ("how it reads", "what it writes"), strict=True):
        for place, score in enumerate(reversed(scores)):
            values = rows[(rows["score"] == score) & (rows["target"] == target)]["r2"]
            control = SWAPPED in score or score in ("random", RANDOM_DIRECTIONS, SECOND_RUN)
            color = "0.6" if control else "C0"
            axis.plot(values, np.full(len(values), place), "o", color=color, alpha=0.35, markersize=4)
            axis.plot([values.mean()], [place], "|", color=color, markersize=14, markeredgewidth=2)
        axis.set_yticks(range(len(scores)), list(reversed(scores)) if axis is axes[0] else [])
        axis.set_xlim(-0.02, 1.02)
        axis.set_title(title)
        axis.set_xlabel("R² with the change in training")
    return save_figure(
        drawing, NAME, "R² of each score with the realised change, one dot a world; the bar is the mean"
    )


def report(rows: pd.DataFrame) -> None:
    """Write docs/studies/prediction.md."""
    longer = rows["steps"].map(len) > 1
    short = rows[~longer]
    means = short.groupby(["target", "score"])["r2"].mean()
    predictors = list(NAMES.values())
    best = {target: means[target][predictors].idxmax() for target in (READ, WRITTEN)}
    worlds = short.groupby(["seed", "plant"]).ngroups
    sections = [
        f"{worlds} worlds ({short['seed'].nunique()} seeds × {short['plant'].nunique()} planted behaviours, each planted in "
        f"{STRENGTH:.0%} of 640 pairs in half of which a right answer wins). A DPO run of {STEPS} AdamW steps of 16 pairs with "
        "TRL; the scores are computed before it. Target: the change of each feature's mean activation on "
        f"{HELD_OUT_PAIRS} held-out pairs that both checkpoints *read*, and on four answers each that both *write* at "
        f"{HELD_OUT_PROMPTS} held-out prompts, read by the model before. Numbers are means over the worlds; in brackets "
        "bootstrap intervals over worlds. [verify.md](../verify.md) defines R², ρ and top 20; a score that says up where the "
        "change is down has R² 0.",
        figure(short),
        markdown_table(table(short)),
        "*Labels swapped*: the same scores, from the same pairs with chosen and rejected exchanged in a random half. *A second run*: "
        "the change in a run that differs in the order of the pairs only: as far as runs agree. Both in the worlds with "
        f"`{CONTROLLED}` only. "
        "*Lookahead*: first order in one usual step. *Rehearsal*: four long steps, as far as the run's end.",
        "## Ahead of the others",
        markdown_table(leads(short, best)),
        "## World by world",
        "R² with intervals over prompts: within one run, scores are apart where these are. The slope is 1 where sizes are right as "
        "well. *A perfect score*: the R² to expect of one, given the number of prompts.",
        "Reading:",
        markdown_table(by_world(short, READ, [best[READ], "disparity", best[READ] + SWAPPED, SECOND_RUN])),
        "Writing:",
        markdown_table(
            by_world(
                short,
                WRITTEN,
                [best[WRITTEN], "mean activation difference", best[WRITTEN] + SWAPPED, SECOND_RUN],
            )
        ),
    ]
    if longer.any():
        sections += [
            "## Over training",
            f"{rows[longer]['seed'].nunique()} worlds with `agrees`, R² after 10, 40 and 160 steps of one run (160 are four "
            "epochs); rehearsals of as many steps.",
            markdown_table(over_training(rows[longer])),
        ]
    write_report(NAME, "Which score predicts what training does?", sections)


def main() -> None:
    study(__doc__, NAME, cells, run, report)


if __name__ == "__main__":
    main()
