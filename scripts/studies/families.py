"""Are the features that carry one behaviour one family, and features of other behaviours not in it?

    python scripts/studies/families.py --seeds 8

In worlds of the lab, a behaviour planted in 70 % of the pairs. The correlation at which features are joined was chosen on worlds 0 and
1; the others are the test. Of the family with the most carriers of the planted behaviour: the share of all carriers in it (goal 80 %),
and the share of its members that carry the behaviour or at least tell it (an area under the ROC curve of 0.65 over held-out answers;
goal 80 %, beside the share of all features that do). Carriers of two behaviours that are drawn independently must not share a family.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from common import Cell, bootstrap_interval, markdown_table, write_report
from lab_scores import planted_pairs, study

from trl_sae_audit import audit_preferences, load_dictionary
from trl_sae_audit.lab import build_world

NAME = "families"
PLANTS = ("agrees", "padded", "marked")
STRENGTH = 0.7
TELLS = 0.65
CHOSEN_ON = (0, 1)
GOAL = 0.8


def cells(seeds: int) -> list[Cell]:
    return [{"seed": seed, "plant": plant} for seed in range(seeds) for plant in PLANTS]


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    world = build_world(cell["seed"], progress=False)
    audit = audit_preferences(
        world.model(),
        world.tokenizer,
        planted_pairs(world, cell["plant"], STRENGTH),
        load_dictionary(world.dictionary_path),
        lookahead=None,
        batch_size=32,
        progress=False,
    )
    family = audit.features().set_index("feature")["family"]
    carriers = {plant: world.carriers(plant) for plant in PLANTS}
    own = carriers[cell["plant"]]
    known = [number for number in family[own] if number]
    largest = max(set(known), key=known.count, default=0)
    members = [int(feature) for feature in family[family == largest].index] if largest else []
    truth = world.ground_truth
    truth = truth[truth["behaviour"] == cell["plant"]].set_index("feature")
    tells = truth.index[(truth["auc"] >= TELLS) | truth["carrier"]]
    mixed = [
        (one, other)
        for first, second in combinations(PLANTS, 2)
        for one in carriers[first]
        for other in carriers[second]
        if one != other and family[one] == family[other] > 0
    ]
    yield {
        "carriers": len(own),
        "in_largest": float(np.mean([feature in members for feature in own])),
        "members": len(members),
        "tell": float(np.mean([feature in tells for feature in members])) if members else float("nan"),
        "tell_of_all": len(tells) / len(truth),
        "mixed": len(mixed),
        "families": int(family.max()),
    }


def report(rows: pd.DataFrame) -> None:
    """Write its part of docs/studies/topics.md."""
    test = rows[~rows["seed"].isin(CHOSEN_ON)]
    lines = []
    carriers = test.pivot(index="seed", columns="plant", values="carriers")
    pairs = sum(int((carriers[one] * carriers[other]).sum()) for one, other in combinations(PLANTS, 2))
    for plant in PLANTS:
        part = test[test["plant"] == plant]
        lines.append(
            {
                "planted": plant,
                "carriers": f"{part['carriers'].min()} to {part['carriers'].max()}",
                "of them in one family": _percent(part["in_largest"]),
                "members of that family": f"{part['members'].min()} to {part['members'].max()}",
                "of them carry or tell it": _percent(part["tell"]),
                "of all features": f"{part['tell_of_all'].mean():.0%}",
                "pairs of carriers of two behaviours in a family": f"{part['mixed'].sum()} of {pairs:,}",
            }
        )
    write_report(
        NAME,
        "Families",
        [
            f"{test['seed'].nunique()} worlds ({', '.join(map(str, sorted(test['seed'].unique())))}); the threshold was chosen on others. "
            f"Means over worlds with 95 % bootstrap intervals. Goal: {GOAL:.0%} in both shares, and no mixed pair.",
            markdown_table(pd.DataFrame(lines)),
        ],
        page="topics",
    )


def _percent(values: pd.Series) -> str:
    found = bootstrap_interval(values.dropna().to_numpy())
    return f"{found.estimate:.0%} ({found.low:.0%} to {found.high:.0%})"


if __name__ == "__main__":
    assert __doc__ is not None
    study(__doc__, NAME, cells, run, report)
