"""Do the scores of a running training say what it changes in generations, and did the audit before it?

    python scripts/studies/live.py

In the lab: DPO on pairs in which a behaviour is planted, and GRPO with a reward for it, observed by the callback with its defaults and
with 500 prompts of its own, against the change of every feature's mean activation in other answers to these prompts. Of DPO
runs also what the default audit of the pairs says, and the same training once more with the pairs in another order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from common import Cell, bootstrap_interval, markdown_table, write_report
from lab_scores import planted_pairs, study
from selection import HELD_OUT, PLANTS, train, world_of, written

from trl_sae_audit import FeatureAttributionCallback, RunRecord, audit_preferences
from trl_sae_audit.lab import World
from trl_sae_audit.lab.training import dpo_arguments
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.verification.comparison import verify
from trl_sae_audit.verification.measured import MeasuredChange

NAME = "live"
WORLDS, GRPO_WORLDS = 20, 5
STEPS = {"DPO": 40, "GRPO": 24}
LIVE = {
    "generation_drift_500": "generation drift, 500 prompts",
    "generation_drift": "generation drift, default (64 prompts)",
    "selection": "selection, default",
    "attribution": "attribution",
}
AUDITED = {
    "effect_size": "effect size",
    "predicted_change_in_generations": "predicted change in generations",
    "audit_selection": "selection",
    "projection_difference": "projection difference",
    "mean_activation_difference": "mean activation difference",
    "disparity": "disparity",
    "audit_attribution": "attribution",
}


def cells(worlds: int = WORLDS) -> list[Cell]:
    """World by world another behaviour; those with GRPO after those with DPO."""
    dpo = [{"trainer": "DPO", "seed": s, "plant": PLANTS[s % 4], "strength": 0.7} for s in range(worlds)]
    rewarded = min(worlds, GRPO_WORLDS)
    grpo = [{"trainer": "GRPO", "seed": s, "plant": PLANTS[s % 3], "strength": 1.0} for s in range(rewarded)]
    return dpo + grpo


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    world, dictionary, before = world_of(cell["seed"])
    scores: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as directory:
        if cell["trainer"] == "DPO":
            scores |= _audited(world, dictionary, cell, directory)
        prompts = world.prompts(HELD_OUT, 400 + cell["seed"], split="heldout")
        observers = {
            "default": FeatureAttributionCallback(
                dictionary,
                f"{directory}/default",
                generations=Sampling(answers=4, max_new_tokens=56),
                generation_steps=STEPS[cell["trainer"]],
            ),
            "500": FeatureAttributionCallback(
                dictionary,
                f"{directory}/500",
                generations=Sampling(answers=4, max_new_tokens=56, seed=3),
                generation_prompts=prompts,
                generation_steps=STEPS[cell["trainer"]],
                selection=False,
            ),
        }
        model = world.model()
        train(world, model, cell, f"{directory}/out", callbacks=list(observers.values()))
        for name in ("default", "500"):
            found = RunRecord.load(f"{directory}/{name}").features().set_index("feature").sort_index()
            scores |= _live(found, "" if name == "default" else "_500")
        change = MeasuredChange("in generations", before, written(world, dictionary, model.eval()))
        if cell["trainer"] == "DPO":
            again = world.model()
            train(world, again, cell, f"{directory}/again", seed=1)
            scores["second run"] = MeasuredChange(
                "in generations", before, written(world, dictionary, again.eval())
            ).change
    verification = verify({name: np.nan_to_num(values) for name, values in scores.items()}, change)
    for name, statistics in verification.statistics.items():
        yield {
            "score": name,
            "r2": statistics["r2"].estimate,
            "spearman": statistics["spearman"].estimate,
            "top20": statistics["precision"].estimate,
            "ceiling": verification.ceiling,
        }


def _audited(world: World, dictionary: Any, cell: Cell, directory: str) -> dict[str, np.ndarray]:
    audit = audit_preferences(
        world.model(),
        world.tokenizer,
        planted_pairs(world, cell["plant"], cell["strength"]),
        dictionary,
        args=dpo_arguments(f"{directory}/audit"),
        batch_size=64,
        progress=False,
    )
    table = audit.features().set_index("feature").sort_index()
    return {name: table[name.removeprefix("audit_")].to_numpy(float) for name in AUDITED}


def _live(found: pd.DataFrame, suffix: str) -> dict[str, np.ndarray]:
    names = ("generation_drift",) if suffix else ("generation_drift", "selection", "attribution")
    return {name + suffix: found[name].to_numpy(float) for name in names}


def report(rows: pd.DataFrame) -> None:
    sections = [
        "Lab worlds, one behaviour in each. DPO: 40 steps of 16 pairs, a right answer preferred in half of the pairs and the behaviour in 70 %. "
        "GRPO: 24 steps of 64 answers, reward 1 for a right answer and 1 for the behaviour. Target: the change of each feature's mean activation in four "
        f"answers at each of {HELD_OUT} held-out prompts, read by the model before; the live scores sampled other answers. `ceiling` is the R² that a "
        "perfect score would have at so many prompts. In brackets bootstrap intervals over worlds.",
    ]
    for trainer, part in rows.groupby("trainer", sort=False):
        lines = []
        names = LIVE | ({**AUDITED, "second run": "a second run"} if trainer == "DPO" else {})
        for score, label in {**names, "random": "random"}.items():
            found = part[part["score"] == score]
            when = "while training" if score in LIVE else "before, audit" if score in AUDITED else ""
            interval = bootstrap_interval(found["r2"].to_numpy())
            lines.append(
                {
                    "score": label,
                    "": when,
                    "R²": f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})",
                    "least R²": f"{found['r2'].min():.2f}",
                    "ρ": f"{found['spearman'].mean():.2f}",
                    "of its first 20 right": f"{found['top20'].mean():.0%}",
                }
            )
        worlds = part["seed"].nunique()
        ceiling = part["ceiling"].mean()
        sections += [
            f"## {trainer}, {worlds} worlds (ceiling {ceiling:.2f})",
            markdown_table(pd.DataFrame(lines)),
        ]
    shown = [
        name
        for name in (*LIVE, "effect_size", "projection_difference", "second run")
        if (rows["score"] == name).any()
    ]
    single = rows[rows["score"].isin(shown)].pivot_table(
        index=["trainer", "plant", "seed"], columns="score", values="r2", sort=True
    )[shown]
    sections += ["## World by world\n\nR²:", markdown_table(single.map("{:.2f}".format).reset_index())]
    write_report(NAME, "The scores of a running training", sections, page="prediction")


if __name__ == "__main__":
    study(str(__doc__), NAME, cells, run, report)
