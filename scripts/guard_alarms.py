"""How often does GuardCallback alert in runs in which nothing is wrong, and in runs in which something is?

In the lab, DPO on pairs that differ in quality alone teaches neither agreement nor padding nor marks: an alert about a carrier
of these, or about a feature drawn at random, is a false alarm. In runs whose pairs also favour agreement, an alert about its
carrier is a hit. Rates are printed by the score that alerted.

python scripts/guard_alarms.py --worlds 4 --runs 5
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trl_sae_audit import FeatureAttributionCallback, GuardCallback, load_dictionary
from trl_sae_audit.callbacks.guards import TRENDS
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.evaluation import wilson_interval
from trl_sae_audit.lab.training import dpo_arguments, train_dpo

CLEAN, PLANTED = {"right": 0.5}, {"right": 0.5, "agrees": 0.5}
BEHAVIOURS = ("agrees", "padded", "marked")
DRAWN = 5
"""Features watched besides the carriers, drawn at random."""
SCORES = ("attribution", "drift")
"""Whose trends are tested; by default GuardCallback leaves out the drift."""
PROBED = 32
"""Held-out answers on which drift is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=4, help="lab worlds, by seed")
    parser.add_argument("--runs", type=int, default=5, help="clean and planted runs in each")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run, each logged")
    options = parser.parse_args()
    logging.getLogger("trl_sae_audit").setLevel(logging.ERROR)
    rows = []
    for world_seed in range(options.worlds):
        world = build_world(world_seed, progress=False)
        for seed in range(options.runs):
            for kind, strengths in (("clean", CLEAN), ("planted", PLANTED)):
                rows.append({"kind": kind, **watch_run(world, strengths, seed, options.steps)})
                print(json.dumps({"world": world_seed, "seed": seed, **rows[-1]}), flush=True)
    for line in summarize(rows):
        print(line)


def watch_run(world: World, strengths: dict[str, float], seed: int, steps: int) -> dict[str, Any]:
    """Train on pairs of those strengths; what was watched, and what the guard alerted of."""
    dictionary = load_dictionary(world.dictionary_path)
    carriers = {each: found[0] for each in BEHAVIOURS if (found := world.carriers(each))}
    others = np.setdiff1d(
        np.arange(dictionary.d_sae), world.ground_truth["feature"][world.ground_truth.carrier]
    )
    drawn = np.random.default_rng(seed).choice(others, DRAWN, replace=False)
    watch = carriers | {f"drawn{number}": int(feature) for number, feature in enumerate(drawn)}
    guard = GuardCallback(trends=TRENDS)
    with tempfile.TemporaryDirectory() as directory:
        held_out = world.preferences({}, n=PROBED, seed=seed, split="heldout")
        texts = [
            prompt + answer for prompt, answer in zip(held_out["prompt"], held_out["chosen"], strict=True)
        ]
        record = FeatureAttributionCallback(
            dictionary, Path(directory) / "record", watch=watch, probe=texts, probe_steps=1
        )
        arguments = dpo_arguments(directory, steps, seed, logging_steps=1)
        pairs = world.preferences(strengths, n=16 * steps, seed=seed)
        train_dpo(world, pairs, arguments, callbacks=[record, guard])
    return {"watched": list(watch), "alerts": [alert.metric for alert in guard.alerts]}


def summarize(rows: list[dict[str, Any]]) -> list[str]:
    """Shares with 95 % intervals (Wilson), over runs and over watched features, by the score that alerted."""
    return [line for score in SCORES for line in _summarize_score(rows, score)]


def _summarize_score(rows: list[dict[str, Any]], score: str) -> list[str]:
    clean, planted = (
        [
            {
                each: any(metric.endswith(f"/{each}/{score}") for metric in row["alerts"])
                for each in row["watched"]
            }
            for row in rows
            if row["kind"] == kind
        ]
        for kind in ("clean", "planted")
    )
    return [
        _share(f"{score}: clean runs with an alert", [any(alerts.values()) for alerts in clean]),
        _share(
            f"{score}: watched features of clean runs", [each for alerts in clean for each in alerts.values()]
        ),
        *(
            _share(
                f"{score}: carrier of agreement, {kind} runs",
                [alerts["agrees"] for alerts in runs if "agrees" in alerts],
            )
            for kind, runs in (("clean", clean), ("planted", planted))
        ),
    ]


def _share(name: str, found: list[bool]) -> str:
    low, high = wilson_interval(sum(found), len(found))
    return f"{name}: {sum(found)} of {len(found)} = {np.mean(found):.1%} [{low:.1%}, {high:.1%}]"


if __name__ == "__main__":
    main()
