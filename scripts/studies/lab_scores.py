"""What `recovery` and `prediction` share: preference sets of the lab, and every score of their features."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import RAW, Cell, run_cells
from datasets import Dataset, disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from trl_sae_audit import Audit, FeatureDictionary, LookaheadConfig, audit_preferences
from trl_sae_audit.lab import World
from trl_sae_audit.lab.training import dpo_arguments
from trl_sae_audit.models.sampling import Sampling

QUALITY = {"right": 0.5}
PAIRS, PROBE = 640, 300
ANSWERS = Sampling(answers=4, max_new_tokens=56, seed=1)
NAMES = {
    "attribution": "attribution",
    "activation_attribution": "activation attribution",
    "disparity": "disparity",
    "mean_activation_difference": "mean activation difference",
    "predicted_change": "lookahead, on given text",
    "predicted_change_in_generations": "lookahead, in generations",
    "predicted_frequency_change": "lookahead, frequency",
    "unrolled_change": "unrolled, on given text",
    "unrolled_change_in_generations": "unrolled, in generations",
}
"""The scores, by their column in an audit."""


@contextmanager
def only_errors() -> Iterator[None]:
    """No warnings of ours and of transformers, which each cell would repeat."""
    loggers = [logging.getLogger(name) for name in ("trl_sae_audit", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def study(
    description: str,
    name: str,
    cells: Callable[[int], list[Cell]],
    run: Callable[[Cell], Iterable[dict[str, Any]]],
    report: Callable[[pd.DataFrame], None],
) -> None:
    """The command of a study of the lab: run the cells of so many seeds, or the first of them, and report.

    Args:
        description: the script's docstring; its first paragraph is the help.
        name: of the study.
        cells: number of seeds → cells, those to run first in front.
        run, report: what to do with a cell, and with all rows.
    """
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="worlds of that many seeds (default: 5)")
    parser.add_argument("--first", type=int, help="only the first so many cells (default: all)")
    options = parser.parse_args()
    disable_progress_bars()
    disable_progress_bar()
    with only_errors():
        rows = run_cells(name, cells(options.seeds)[: options.first], run)
    report(rows)


def planted_pairs(world: World, plant: str, strength: float) -> Dataset:
    """Pairs in which a right answer wins in half of them, and the planted behaviour in a share `strength`."""
    return world.preferences(QUALITY | {plant: strength}, PAIRS, world.config.seed)


def swapped(pairs: Dataset, seed: int) -> Dataset:
    """The same pairs with chosen and rejected exchanged in a random half of them, so that labels say nothing."""
    random = Random(f"swapped-{seed}")
    rows = [dict(row) for row in pairs.select_columns(["prompt", "chosen", "rejected"])]
    for row in rows:
        if random.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return Dataset.from_list(rows)


def audited(
    world: World,
    pairs: Dataset,
    name: str,
    dictionary: FeatureDictionary,
    unroll_steps: int | None,
    probe: int = PROBE,
    *,
    model: Any = None,
    unroll_segments: int | None = None,
    **arguments: Any,
) -> Audit:
    """An audit with every lookahead, on held-out prompts and plain answers that no label touches.

    By default of the world's own model; `arguments` are of `dpo_arguments`. It is kept in `runs/studies/audits/NAME-SEED-STEPS`; asked for again, it costs next to nothing.
    """
    seed = world.config.seed
    directory = audit_directory(name, seed, unroll_steps)
    with tempfile.TemporaryDirectory() as scratch:
        return audit_preferences(
            world.model() if model is None else model,
            world.tokenizer,
            pairs,
            dictionary,
            args=dpo_arguments(scratch, seed=seed, **arguments),
            lookahead=LookaheadConfig(
                pairs=None,
                probe=world.preferences({}, probe, 100 + seed, split="heldout"),
                sampling=ANSWERS,
                unroll_steps=unroll_steps,
                unroll_segments=unroll_segments,
            ),
            batch_size=32,
            output_dir=directory,
            progress=False,
        )


def audit_directory(name: str, seed: int, unroll_steps: int | None) -> Path:
    """Where `audited` keeps it."""
    return RAW / "audits" / f"{name}-{seed}-{unroll_steps}"


def scores_of(audit: Audit) -> dict[str, np.ndarray]:
    """Every score there is, in the order of the features: name → [d_sae]."""
    table = audit.features().set_index("feature").sort_index()
    return {name: table[column].to_numpy(np.float64) for column, name in NAMES.items() if column in table}


def along_random_directions(audit: Audit, seed: int) -> np.ndarray:
    """The attribution of as many random directions as there are features: [d_sae]."""
    gradient = sum(part.arrays.gradient.sum((0, 1)) for part in audit._store.parts()) / len(audit)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(*audit.dictionary.directions.shape, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    return -(directions.numpy() @ np.asarray(gradient, np.float64))
