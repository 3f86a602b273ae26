"""Does a direction made of pairs read a behaviour as well as the features that carry it?

    python scripts/studies/directions_lab.py --seeds 2

In the lab, whose answers are read by rule. A direction, and a feature, are chosen on 36 pairs of which one answer has the behaviour; the
carrier is the feature that the lab's ground truth names first. Each is then to tell held-out plain answers with the behaviour
from those without, by its mean or its maximum over the answer: R², the square of the correlation, and AUC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from common import Cell, bootstrap_interval, markdown_table, write_report
from lab_scores import study
from scipy.stats import rankdata

from trl_sae_audit import FeatureScorer, load_dictionary
from trl_sae_audit.lab import build_world
from trl_sae_audit.lab.ground_truth import auc
from trl_sae_audit.saes.contrast import contrast_directions
from trl_sae_audit.saes.pooling import Pooling

BEHAVIOURS = ("agrees", "padded", "marked")
PAIRS, ANSWERS = 36, 500
POOLINGS: tuple[Pooling, ...] = ("mean", "max")
READERS = ("direction", "feature chosen on the same pairs", "carrier")


def read(cell: Cell) -> Iterator[dict[str, Any]]:
    world = build_world(cell["seed"], progress=False)
    behaviour = cell["behaviour"]
    drawn = world.preferences({behaviour: 1.0}, PAIRS, 200 + cell["seed"])
    pairs = [
        {"prompt": row["prompt"], "positive": row["chosen"], "negative": row["rejected"]} for row in drawn
    ]
    model, tokenizer = world.model(), world.tokenizer
    directions = contrast_directions(model, tokenizer, {behaviour: pairs}, [world.hook_point], missing="keep")
    features = load_dictionary(world.sae, hook_point=world.hook_point, name="sae")
    every = range(features.d_sae)
    held_out = world.preferences({}, ANSWERS, 300 + cell["seed"], split="heldout")
    prompts, answers = list(held_out["prompt"]), list(held_out["chosen"])
    has = np.array(held_out[f"chosen_{behaviour}"], bool)
    carriers = world.carriers(behaviour)
    for pooling in POOLINGS:
        of_direction = FeatureScorer(model, tokenizer, directions, pooling=pooling)
        of_features = FeatureScorer(model, tokenizer, features, pooling=pooling)
        picked = best_feature(of_features, pairs, every)
        read_by = [(READERS[0], of_direction, 0), (READERS[1], of_features, picked)]
        read_by += [(READERS[2], of_features, carrier) for carrier in carriers[:1]]
        for reader, scorer, feature in read_by:
            values = scorer.score(prompts, answers, [feature])[:, 0].numpy()
            yield {
                "reader": reader,
                "pooling": pooling,
                "r2": float(np.corrcoef(values, has)[0, 1] ** 2) if values.std() > 0 else 0.0,
                "auc": float(auc(rankdata(values)[:, None], has)[0]),
            }


def best_feature(scorer: FeatureScorer, pairs: list[dict[str, str]], every: Sequence[int]) -> int:
    """The feature that tells the two sides of the pairs apart best, by AUC."""
    prompts = [pair["prompt"] for pair in pairs]
    scores = [
        scorer.score(prompts, [pair[side] for pair in pairs], every).numpy()
        for side in ("positive", "negative")
    ]
    return int(auc(rankdata(np.concatenate(scores), axis=0), np.arange(2 * len(pairs)) < len(pairs)).argmax())


def report(frame: pd.DataFrame) -> None:
    rows = []
    for (behaviour, reader), part in frame.groupby(["behaviour", "reader"], sort=False):
        rows.append({"behaviour": behaviour, "read by": reader})
        for pooling in POOLINGS:
            for name, column in (("R²", "r2"), ("AUC", "auc")):
                values = part[part["pooling"] == pooling][column]
                rows[-1][f"{name}, {pooling}"] = (
                    f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"
                )
    lost = []
    for pooling in POOLINGS:
        wide = frame[frame["pooling"] == pooling].pivot(
            index=["seed", "behaviour"], columns="reader", values="r2"
        )
        found = bootstrap_interval((wide[READERS[1]] - wide[READERS[0]]).to_numpy())
        lost.append(f"by the {pooling} {found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}]")
    write_report(
        "directions_lab",
        "Direction or feature, in the lab",
        [
            " ".join((__doc__ or "").split("\n\n")[-1].split()),
            f"Mean over {frame['seed'].nunique()} worlds (lowest to highest).",
            markdown_table(pd.DataFrame(rows)),
            "R² of the feature chosen on the same pairs less that of the direction, over worlds and behaviours: "
            + ", ".join(lost)
            + ".",
        ],
        page="directions",
    )


def main() -> None:
    study(
        __doc__ or "",
        "directions_lab",
        lambda seeds: [
            {"seed": seed, "behaviour": behaviour} for seed in range(seeds) for behaviour in BEHAVIOURS
        ],
        read,
        report,
    )


if __name__ == "__main__":
    main()
