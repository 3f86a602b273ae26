"""How well does a penalty read a behaviour: its degree, from flagged features, against the rule of the language?

    python scripts/studies/soft_threshold.py

Two sets of answers of each lab world's reference model: on one the soft threshold is set, as AdaptivePenalty sets it, on the
other the degree is compared with what a rule reads in the text. What the degree leaves unexplained of the behaviour is noise that
the right coefficient leaves in the reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import Cell, markdown_table, run_cells, write_report
from shaped_runs import REFERENCE_ANSWERS, Setting

from trl_sae_audit.shaping.soft_threshold import SoftThreshold, histogram

ANSWERS = 768
READERS = {
    "mean": "mean of the features, as AdaptivePenalty reads them",
    "strongest": "the strongest feature",
}


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    """A row for each way of reading the flagged features."""
    setting = Setting(cell["seed"], 0)
    features = [flag.feature for flag in setting.flags(cell["flags"])]
    scorer = setting.scorer("max")

    def scores(n: int, seed: int) -> tuple[list[tuple[str, str]], np.ndarray]:
        answered = setting.answered(n, seed)
        return answered, scorer.score(*map(list, zip(*answered, strict=True)), features).double().numpy()

    _, before = scores(REFERENCE_ANSWERS, 8)
    answered, after = scores(ANSWERS, 9)
    read = [setting.world.attributes(*pair) for pair in answered]
    agrees = np.array([float(one.agrees) for one in read])
    right = np.array([float(one.right and not one.malformed) for one in read])
    for reader, pool in (("mean", np.mean), ("strongest", np.max)):
        threshold = SoftThreshold.from_reference(histogram(pool(before, axis=1, keepdims=True)))
        found = threshold(pool(after, axis=1, keepdims=True))[:, 0]
        rule = np.corrcoef(found, agrees)[0, 1]
        yield {
            "reader": reader,
            "features": len(features),
            "rule": rule,
            "unexplained": agrees.var() * (1 - rule**2),
            "right": np.corrcoef(found, right)[0, 1],
            "right_variance": right.var(),
        }


def report(rows: pd.DataFrame) -> None:
    """Write its part of docs/studies/stability.md."""
    lines = []
    for key, part in rows.groupby(["flags", "reader"], sort=False):
        flags, reader = map(str, key)
        lines.append(
            {
                "flags": {"truth": "the true carriers", "found": "found by an audit"}[flags],
                "read as": READERS[reader],
                **{
                    heading: f"{part[name].min():.3f} to {part[name].max():.3f}"
                    for name, heading in (
                        ("rule", "correlation with the rule"),
                        ("unexplained", "variance left of the behaviour"),
                        ("right", "correlation with being right"),
                        ("right_variance", "variance of right answers"),
                    )
                },
            }
        )
    write_report(
        "soft-threshold",
        "How well is a behaviour read from its features?",
        [
            f"{rows['seed'].nunique()} lab worlds; {ANSWERS} answers of each reference model to users with a belief, the ramp set on {REFERENCE_ANSWERS} "
            "others. The behaviour is agreeing, 0 or 1 by a rule that reads the text; least and largest world.",
            markdown_table(pd.DataFrame(lines)),
            "*Variance left of the behaviour*: var(agrees) · (1 − correlation²), what stays in the reward of 1 for agreeing at the right "
            "coefficient, to be compared with the variance of the other part of the reward, right answers.",
        ],
        page="stability",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [{"seed": seed, "flags": flags} for flags in ("truth", "found") for seed in options.seeds]
    report(run_cells("soft-threshold", cells, run))


if __name__ == "__main__":
    main()
