"""Is a behaviour found that is planted at the prompts of one topic in eight, and invisible in the data as a whole?

    python scripts/studies/topics.py --seeds 10

In worlds of the lab. "agrees" wins in 90 % of the pairs of one topic and loses in as many of the others altogether, so that as a whole
the pairs say nothing about it. Rules, decided before looking: it is *found* if one of the first three features of
`Audit.topic_features()` is a carrier of it, beyond chance (q < 0.05), preferred, in a topic at least half of whose prompts are of the
planted one; it is *visible as a whole* if a carrier is among the features that the audit calls beyond chance. A *false flag* is any
cell beyond chance where labels say nothing: chosen and rejected exchanged in a random half of the pairs, or nothing planted.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from common import Cell, markdown_table, write_report
from datasets import Dataset
from lab_scores import QUALITY, study

from trl_sae_audit import Audit, FeatureDictionary, audit_preferences, load_dictionary
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.evaluation import wilson_interval
from trl_sae_audit.lab.topics import TOPICS, topic_preferences

NAME = "topics"
PAIRS = 800
STRENGTH = 0.9
LINES = 3
Q = 0.05
SHUFFLES = 4
GOAL_FOUND, GOAL_FALSE = 9, 0.05
CLUSTERS, COLUMN = "clusters", "a column"
PLANTED = {CLUSTERS: "sum", COLUMN: "color first"}
"""Where it is planted: a kind of question, which clusters can be of; or one of the column's eight topics."""


def cells(seeds: int) -> list[Cell]:
    planted = [
        {"seed": seed, "topics": topics, "labels": "planted"} for seed in range(seeds) for topics in PLANTED
    ]
    return planted + [{"seed": seed, "topics": "both", "labels": "null"} for seed in range(seeds)]


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    world = build_world(cell["seed"], progress=False)
    dictionary = load_dictionary(world.dictionary_path)
    if cell["labels"] == "null":
        return list(_false_flags(world, dictionary))
    pairs = planted(world, PLANTED[cell["topics"]])
    audit = _audit(world, pairs, dictionary, column_of(cell["topics"]))
    carriers, table = set(world.carriers("agrees")), audit.topic_features()
    purity = _purity(audit, np.array(pairs["planted_topic"]))
    beyond = table[table["q_value"] < Q]
    first = beyond.drop_duplicates("feature").head(LINES)
    found = [
        row["feature"] in carriers and row["interaction"] > 0 and purity[row["topic"] - 1] >= 0.5
        for row in first.to_dict("records")
    ]
    elsewhere = purity[beyond["topic"].to_numpy() - 1] < 0.5
    return [
        {
            "found": any(found),
            "visible": bool(carriers & set(audit.beyond_chance()["feature"])),
            "number": len(purity),
            "purity": float(purity.max()),
            "beyond": len(beyond),
            "of_carriers_elsewhere": int((elsewhere & beyond["feature"].isin(carriers)).sum()),
            "tested": len(table),
            "words": " | ".join(first["words"]),
        }
    ]


def planted(world: World, topic: str, strength: float = STRENGTH) -> Dataset:
    """Pairs in which it wins in one topic, and loses as often elsewhere."""
    others = -strength / (len(TOPICS) - 1)
    return topic_preferences(
        world.language,
        topic,
        QUALITY | {"agrees": strength},
        QUALITY | {"agrees": others},
        PAIRS,
        seed=world.config.seed,
    )


def column_of(topics: str) -> str | None:
    return "topic" if topics == COLUMN else None


def _audit(world: World, pairs: Dataset, dictionary: FeatureDictionary, column: str | None) -> Audit:
    return audit_preferences(
        world.model(),
        world.tokenizer,
        pairs,
        dictionary,
        lookahead=None,
        batch_size=32,
        topic_column=column,
        progress=False,
    )


def _purity(audit: Audit, planted: np.ndarray) -> np.ndarray:
    """Share of each topic's prompts that are of the planted one."""
    topics = audit.topic_numbers()
    return np.array([planted[topics == number].mean() for number in audit.topics()["topic"]])


def _false_flags(world: World, dictionary: FeatureDictionary) -> Iterable[dict[str, Any]]:
    seed = world.config.seed
    sets = {"nothing planted": topic_preferences(world.language, "sum", {}, {}, PAIRS, seed=seed)}
    pairs = planted(world, "sum")
    sets |= {f"exchanged {n}": _exchanged(pairs, SHUFFLES * seed + n) for n in range(SHUFFLES)}
    for name, rows in sets.items():
        audit = _audit(world, rows, dictionary, None)
        for topics in PLANTED:
            audit.find_topics(rows, column_of(topics))
            table = audit.topic_features()
            flagged = int((table["q_value"] < Q).sum())
            yield {"set": name, "by": topics, "beyond": flagged, "tested": len(table)}


def _exchanged(pairs: Dataset, seed: int) -> Dataset:
    random = Random(f"exchanged-{seed}")
    rows = [dict(row) for row in pairs]
    for row in rows:
        if random.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return Dataset.from_list(rows)


def report(rows: pd.DataFrame) -> None:
    """Write docs/studies/topics.md."""
    planted, null = rows[rows["labels"] == "planted"], rows[rows["labels"] == "null"]
    lines = []
    for topics in PLANTED:
        part = planted[planted["topics"] == topics]
        found, n = int(part["found"].sum()), len(part)
        low, high = wilson_interval(found, n)
        lines.append(
            {
                "topics": topics,
                f"found among the first {LINES}": f"{found} of {n} ({low:.0%} to {high:.0%})",
                "visible as a whole": f"{int(part['visible'].sum())} of {n}",
                "topics found": f"{part['number'].min():.0f} to {part['number'].max():.0f}",
                "carriers beyond chance in another topic, cells": f"{part['of_carriers_elsewhere'].sum():.0f} of {part['beyond'].sum():.0f}",
            }
        )
    flags = []
    for topics in PLANTED:
        part = null[null["by"] == topics]
        for what, of_kind in part.groupby(part["set"].str.startswith("exchanged")):
            some = int((of_kind["beyond"] > 0).sum())
            flags.append(
                {
                    "topics": topics,
                    "labels": "exchanged" if what else "nothing planted",
                    "sets with a flag": f"{some} of {len(of_kind)}",
                    "cells beyond chance": f"{of_kind['beyond'].sum():.0f} of {of_kind['tested'].sum():,.0f}",
                }
            )
    write_report(
        NAME,
        "One topic in eight",
        [
            f'{PAIRS} pairs a set, no lookahead. In {len(planted) // len(PLANTED)} worlds "agrees" wins in {STRENGTH:.0%} of the pairs of one '
            "topic in eight and loses in as many of all others together. "
            f"Goal: found in at least {GOAL_FOUND} of 10 worlds.",
            markdown_table(pd.DataFrame(lines)),
            f"Where labels say nothing (goal: a flag in at most {GOAL_FALSE:.0%} of the sets; {SHUFFLES} exchanges a world):",
            markdown_table(pd.DataFrame(flags)),
        ],
    )
    for row in planted.sort_values(["topics", "seed"]).to_dict("records"):
        print(row["topics"], row["seed"], "found" if row["found"] else "missed", row["words"])


if __name__ == "__main__":
    assert __doc__ is not None
    study(__doc__, NAME, cells, run, report)
