"""Which score, computed before training, predicts what a DPO run does to the features?

    python scripts/studies/prediction.py

In the lab: worlds of five seeds, four planted behaviours each. Scores of an audit, against the change of every feature's mean
activation in the run, on given text (held-out answers) and in generations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from common import Cell, bootstrap_interval, markdown_table, new_figure, save_figure, write_report
from lab_scores import (
    NAMES,
    along_random_directions,
    audited,
    planted_pairs,
    scores_of,
    study,
    swapped,
)
from prediction_meter import (
    AS_IT_IS,
    FINELY,
    GENERATIONS,
    GENTLY,
    GIVEN_TEXT,
    HELD_OUT_PAIRS,
    HELD_OUT_PROMPTS,
    LAYERS,
    LORA,
    LORA_LEARNING_RATE,
    STEPS,
    agreement,
    mean_change,
    meter_of,
)

from trl_sae_audit import verify
from trl_sae_audit.verification.measured import (
    MeasuredChange,
)

NAME = "prediction"
PLANTS = ("agrees", "padded", "marked", "echoes")
STRENGTH = 0.7
OVER_TRAINING = (10, 40, 160)
ONE_RUN, MEAN_RUN = "one run", "mean of the runs"
SEVERAL = {0: 3, 3: 3, 2: 2, 1: 2, 4: 2}
"""Of which of the first worlds there are how many runs, those first whose runs agree most and least."""
SWAPPED, SECOND_RUN, RANDOM_DIRECTIONS = ", labels swapped", "a second run", "attribution, random directions"


def cells(seeds: int) -> list[Cell]:
    """One run a world, all seeds and behaviours early; of the first worlds several runs, which differ in the order of the
    pairs, and the control; the other worlds; in two worlds a longer run, looked at three times; in the first three LoRA,
    and dictionaries of other layers."""
    worlds = [
        {"seed": seed, "plant": PLANTS[(seed + shift) % len(PLANTS)], "steps": [STEPS]}
        for shift in range(len(PLANTS))
        for seed in range(seeds)
    ]
    several = [
        {**worlds[place], "runs": runs, "control": True} for place, runs in SEVERAL.items() if place < seeds
    ]
    longer = [
        {"seed": seed, "plant": "agrees", "steps": list(OVER_TRAINING)} for seed in range(min(seeds, 2))
    ]
    others = [
        {**world, "variant": variant}
        for variant in (LORA, *LAYERS, FINELY, GENTLY)
        for world in worlds[: min(seeds, 3)]
    ]
    return worlds[:seeds] + several + worlds[seeds:] + longer + others


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    """Scores before training, one run or several, and how well each score predicted them at each length.

    A row a score and target. `of` says what is predicted: the first run, or what the runs have in common, their mean. `shared`
    is the R² with it that a score could have which knows what all such runs have in common.
    """
    meter = meter_of(cell["seed"], cell.get("variant", AS_IT_IS))
    world, dictionary = meter.world, meter.dictionary
    pairs = planted_pairs(world, cell["plant"], STRENGTH)
    name = f"{cell['plant']}-{STRENGTH}{meter.suffix}"
    runs = [meter.changes(pairs, name, cell["steps"], order) for order in range(cell.get("runs", 1))]
    for steps in cell["steps"]:
        options = {"model": meter.model(), "unroll_segments": meter.segments, **meter.arguments}
        audit = audited(world, pairs, name, dictionary, steps, **options)
        scores = scores_of(audit) | {RANDOM_DIRECTIONS: along_random_directions(audit, cell["seed"])}
        if cell.get("control"):
            others = swapped(pairs, cell["seed"])
            control = audited(world, others, f"{cell['plant']}-swapped{meter.suffix}", dictionary, steps)
            scores |= {name + SWAPPED: value for name, value in scores_of(control).items()}
        for changes in zip(*(made[steps] for made in runs), strict=True):
            yield from _compared(scores, changes, steps)


def _compared(
    scores: dict[str, np.ndarray], changes: Sequence[MeasuredChange], steps: int
) -> Iterable[dict[str, Any]]:
    """Scores against the first of some runs, and against their mean."""
    targets = [(ONE_RUN, changes[0], scores, np.nan)]
    if len(changes) > 1:
        again = agreement(changes)
        of_mean = len(changes) * again / (1 + (len(changes) - 1) * again)
        targets = [
            (ONE_RUN, changes[0], scores | {SECOND_RUN: changes[1].change}, again),
            (MEAN_RUN, mean_change(changes), scores, of_mean),
        ]
    for of, target, known, shared in targets:
        found = verify(known, target, draws=200)
        for row in found.table.to_dict("records"):
            yield {
                "run_steps": steps,
                "target": target.kind,
                "of": of,
                "ceiling": found.ceiling,
                "shared": shared,
                "features": len(found.features),
                **{str(key): value for key, value in row.items()},
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
    """A line a score: mean over the worlds of each statistic with its interval, on given text and in generations."""
    lines = []
    for score in [name for name in ORDER if name in set(rows["score"])]:
        line = {"score": score}
        for target in (GIVEN_TEXT, GENERATIONS):
            part = rows[(rows["score"] == score) & (rows["target"] == target)]
            interval = bootstrap_interval(part["r2"].to_numpy())
            around = f"{interval.low:.2f} to {interval.high:.2f}" if len(part) > 1 else "one world"
            line[f"{target}: R²"] = f"{interval.estimate:.2f} ({around})"
            for statistic, label in (("spearman", "ρ"), ("precision", "top 20")):
                line[f"{target}: {label}"] = f"{part[statistic].mean():.2f}"
        lines.append(line)
    return pd.DataFrame(lines)


def leads(rows: pd.DataFrame, best: dict[str, str]) -> pd.DataFrame:
    """By how much the best score is ahead of others in the same worlds, and how often."""
    lines = []
    for target in (GIVEN_TEXT, GENERATIONS):
        wide = rows[rows["target"] == target].pivot_table(
            index=["seed", "plant"], columns="score", values="r2"
        )
        ours = wide[best[target]]
        others = [
            "disparity",
            "mean activation difference",
            "attribution",
            "activation attribution",
            f"lookahead, {target}",
            f"unrolled, {target}",
            best[target] + SWAPPED,
        ]
        for other in [name for name in others if name != best[target]]:
            gap = (ours - wide[other]).dropna().to_numpy()
            interval = bootstrap_interval(gap)
            lines.append(
                {
                    "": target,
                    "R² of": best[target],
                    "less that of": other,
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
    ours = rows[rows["target"] == target]
    for _, both in ours.groupby(["seed", "plant"], sort=True):
        world, common = both[both["of"] == ONE_RUN], both[both["of"] == MEAN_RUN].set_index("score")
        by_score, first = world.set_index("score"), world.iloc[0]
        line: dict[str, Any] = {"world": f"{first['plant']}, seed {first['seed']}"}
        for score in [name for name in scores if name in by_score.index]:
            value, low, high = by_score.loc[score, ["r2", "r2_low", "r2_high"]].to_numpy(np.float64)
            line[score] = f"{value:.2f} ({low:.2f} to {high:.2f})"
        line["slope of the first"] = f"{float(world[world['score'] == scores[0]]['slope'].iloc[0]):.2f}"
        line["given the prompts"] = f"{float(first['ceiling']):.2f}"
        if len(common):
            line["what runs share"] = f"{world['shared'].max():.2f}"
            line["the first, of the mean run"] = f"{common.loc[[scores[0]], 'r2'].mean():.2f}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def over_training(rows: pd.DataFrame) -> pd.DataFrame:
    """R² by length of the run, mean over its worlds."""
    shown = [name for name in NAMES.values() if name in set(rows["score"])]
    lines = []
    for score in shown:
        line = {"score": score}
        for target in (GIVEN_TEXT, GENERATIONS):
            for steps in OVER_TRAINING:
                part = rows[
                    (rows["score"] == score) & (rows["target"] == target) & (rows["run_steps"] == steps)
                ]
                line[f"{target}, {steps} steps"] = f"{part['r2'].mean():.2f}"
        lines.append(line)
    return pd.DataFrame(lines)


def by_variant(rows: pd.DataFrame) -> pd.DataFrame:
    """R² of the scores in the worlds in which something else was tried, and as it is in these; means over the worlds."""
    tried = rows[rows["variant"] != AS_IT_IS]
    worlds = tried[["seed", "plant"]].drop_duplicates()
    same = rows[(rows["variant"] == AS_IT_IS) & (rows["length"] == 1)].merge(worlds)
    lines = []
    for variant, part in [(AS_IT_IS, same), *tried.groupby("variant", sort=False)]:
        line = {"": str(variant)}
        for target in (GIVEN_TEXT, GENERATIONS):
            found = part[part["target"] == target].groupby("score")["r2"].mean()
            for score in ("attribution", f"lookahead, {target}", f"unrolled, {target}"):
                line[f"{target}: {score.split(',')[0]}"] = f"{found[score]:.2f}"
            if target == GENERATIONS:
                line[f"{GENERATIONS}: mean activation difference"] = (
                    f"{found['mean activation difference']:.2f}"
                )
        lines.append(line)
    return pd.DataFrame(lines)


def figure(rows: pd.DataFrame) -> str:
    """R² of every score in every world, on given text and in generations."""
    scores = [name for name in ORDER if name in set(rows["score"]) and SWAPPED not in name]
    scores += [f"unrolled, {target}{SWAPPED}" for target in (GIVEN_TEXT, GENERATIONS)]
    drawing, axes = new_figure(2, width=5.2, height=4.2)
    for axis, target in zip(axes, (GIVEN_TEXT, GENERATIONS), strict=True):
        for place, score in enumerate(reversed(scores)):
            values = rows[(rows["score"] == score) & (rows["target"] == target)]["r2"]
            control = SWAPPED in score or score in ("random", RANDOM_DIRECTIONS, SECOND_RUN)
            color = "0.6" if control else "C0"
            axis.plot(values, np.full(len(values), place), "o", color=color, alpha=0.35, markersize=4)
            axis.plot([values.mean()], [place], "|", color=color, markersize=14, markeredgewidth=2)
        axis.set_yticks(range(len(scores)), list(reversed(scores)) if axis is axes[0] else [])
        axis.set_xlim(-0.02, 1.02)
        axis.set_title(target)
        axis.set_xlabel("R² with the change in training")
    return save_figure(
        drawing, NAME, "R² of each score with the measured change, one dot a world; the bar is the mean"
    )


def attainable(rows: pd.DataFrame, best: dict[str, str]) -> pd.DataFrame:
    """Beside the R² of the best score what could be reached, of one run and of the mean of some; means over the worlds."""
    lines = []
    for target in (GIVEN_TEXT, GENERATIONS):
        for of in (ONE_RUN, MEAN_RUN):
            part = rows[(rows["target"] == target) & (rows["of"] == of)]
            ours = part[part["score"] == best[target]]
            second = part[part["score"] == SECOND_RUN]
            line = {"": target, "predicted": of, "score": best[target]}
            for label, values in (
                ("R²", ours["r2"]),
                ("what runs share", ours["shared"]),
                ("R² / shared", ours["r2"] / ours["shared"]),
                *([("R² of a second run", second["r2"])] if len(second) else []),
            ):
                interval = bootstrap_interval(values.to_numpy())
                line[label] = f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"
            lines.append(line)
    return pd.DataFrame(lines).fillna("")


def latest(rows: pd.DataFrame) -> pd.DataFrame:
    """Of a world with one run and with several, the rows of the several, which have the one among them."""
    if "of" not in rows:
        rows = rows.assign(of=ONE_RUN, shared=np.nan)
    if "variant" not in rows:
        rows = rows.assign(variant=AS_IT_IS)
    rows = rows.assign(
        of=rows["of"].fillna(ONE_RUN),
        variant=rows["variant"].fillna(AS_IT_IS),
        length=rows["steps"].map(len),
    )
    return rows.drop_duplicates(
        ["seed", "plant", "variant", "length", "run_steps", "target", "of", "score"], keep="last"
    )


def report(rows: pd.DataFrame) -> None:
    """Write docs/studies/prediction.md."""
    every = latest(rows)
    rows = every[every["variant"] == AS_IT_IS]
    longer = rows["steps"].map(len) > 1
    everything, long = rows[~longer], rows[longer & (rows["of"] == ONE_RUN)]
    short = everything[everything["of"] == ONE_RUN]
    means = short.groupby(["target", "score"])["r2"].mean()
    predictors = list(NAMES.values())
    best = {target: means[target][predictors].idxmax() for target in (GIVEN_TEXT, GENERATIONS)}
    worlds = short.groupby(["seed", "plant"]).ngroups
    controlled = short[short["score"] == best[GIVEN_TEXT] + SWAPPED].groupby(["seed", "plant"]).ngroups
    several = everything[everything["shared"].notna()]
    sections = [
        f"{worlds} worlds ({short['seed'].nunique()} seeds × {short['plant'].nunique()} planted behaviours, each planted in "
        f"{STRENGTH:.0%} of 640 pairs in half of which a right answer wins). A DPO run of {STEPS} AdamW steps of 16 pairs with "
        "TRL; the scores are computed before it. Target: the change of each feature's mean activation on "
        f"{HELD_OUT_PAIRS} held-out pairs (*on given text*), and on four answers each that both checkpoints sample (*in generations*) at "
        f"{HELD_OUT_PROMPTS} held-out prompts, read by the model before. Numbers are means over the worlds; in brackets "
        "bootstrap intervals over worlds. [verify.md](../verify.md) defines R², ρ and top 20; a score that says up where the "
        "change is down has R² 0.",
        figure(short),
        markdown_table(table(short)),
        "*Labels swapped*: the same scores, from the same pairs with chosen and rejected exchanged in a random half "
        f"({controlled} worlds). *A second run*: the change in a run that differs in the order of the pairs only. "
        "*Lookahead*: first order in one usual step. *Unrolled*: long steps of ten usual ones, as far as the run's end.",
        "What they cost, in gradients of a pair: attribution and the lookahead 640 each, once for every pair, however long the run; the "
        f"unrolled run as many as the run, which in one of {STEPS} steps is 640 as well.",
        "## What can be predicted",
        "Runs that differ in nothing but the order of the pairs do not change features alike. What they have in common is all that can "
        "be known before one of them: *what runs share* is their mean correlation over features, the R² of the common part with one "
        "run, and of the mean of several runs what Spearman and Brown's formula makes of it. It holds sampling noise as well.",
        f"{several.groupby(['seed', 'plant']).ngroups} worlds:",
        markdown_table(attainable(several, best)),
        "## Ahead of the others",
        markdown_table(leads(short, best)),
        "## World by world",
        "R² with intervals over prompts: within one run, scores are apart where these are. The slope is 1 where sizes are right as "
        "well. *What runs share*: see above; *given the prompts*: the R² to expect of a perfect score of this one run, given the number "
        "of prompts. *Of the mean run*: of two or three runs together. Empty where there was one run.",
        "On given text:",
        markdown_table(
            by_world(
                everything,
                GIVEN_TEXT,
                [best[GIVEN_TEXT], "disparity", best[GIVEN_TEXT] + SWAPPED, SECOND_RUN],
            )
        ),
        "In generations:",
        markdown_table(
            by_world(
                everything,
                GENERATIONS,
                [best[GENERATIONS], "mean activation difference", best[GENERATIONS] + SWAPPED, SECOND_RUN],
            )
        ),
    ]
    if len(long):
        sections += [
            "## Over training",
            f"{long['seed'].nunique()} worlds with `agrees`, R² after 10, 40 and 160 steps of one run (160 are four "
            "epochs); unrolled runs of as many steps.",
            markdown_table(over_training(long)),
        ]
    tried = every[every["variant"] != AS_IT_IS]
    if len(tried):
        sections += [
            "## LoRA, and other layers",
            f"R² in the same {tried.groupby(['seed', 'plant']).ngroups} worlds. LoRA is trained at a learning rate of {LORA_LEARNING_RATE:g}. The model has layers 0 to 2; the world's "
            "dictionary is of layer 1, and those of the others are trained as it is.",
            markdown_table(by_variant(every[every["of"] == ONE_RUN])),
        ]
    write_report(NAME, "Which score predicts what training does?", sections)


def main() -> None:
    study(__doc__, NAME, cells, run, report)


if __name__ == "__main__":
    main()
