"""What the record says of a run besides its scores: the header of its manifest, and the trainer's own numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..attribution.step_tables import Columns
from ..io.places import absolute_place
from ..models.hook_points import HookPoint
from ..saes.compatibility import model_name
from ..trainers.kinds import LAYOUTS, policy_of, trainer_kind
from .config import AttributionConfig


def record_header(
    config: AttributionConfig,
    trainer: Trainer,
    points: Sequence[HookPoint],
    watch: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """The header of the run's manifest.

    Args:
        config: the callback's.
        trainer: the trainer.
        points: of each dictionary, where it hooks.
        watch: dictionary → label → feature.
    """
    kind = trainer_kind(trainer)
    sides = LAYOUTS[kind].sides
    return {
        "trainer": kind,
        "trainer_class": f"{type(trainer).__module__}.{type(trainer).__qualname__}",
        "model": model_name(policy_of(trainer)),
        "sides": list(sides) if sides else None,
        "processes": trainer.accelerator.num_processes,
        "dictionaries": [
            dataclasses.asdict(dictionary.info) | {"module": point.path}
            for dictionary, point in zip(config.dictionaries, points, strict=True)
        ],
        "config": {
            "watch": watch,
            **config.to_record(),
            "origins": _origins(config, trainer),
            "arguments": trainer.args.to_dict(),
        },
    }


def _origins(config: AttributionConfig, trainer: Trainer) -> dict[str, Any]:
    """What a command about the run need not be told again: places on disk, and names on the Hub."""
    return {
        "model": absolute_place(model_name(policy_of(trainer))),
        "after": str(Path(trainer.args.output_dir).absolute()),  # is made when the trainer first saves
        "dataset": config.dataset and absolute_place(config.dataset),
        "dictionaries": {each.name: each.origin for each in config.dictionaries},
    }


def log_rows(logs: Mapping[str, Any], step: int, global_step: int) -> list[Columns]:
    """The rows of the table `log` for the numbers of one of the trainer's logs; none if it has no number."""
    numbers = {
        name: float(value)
        for name, value in logs.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    n = len(numbers)
    columns = {"step": [step] * n, "global_step": [global_step] * n}
    return [columns | {"name": list(numbers), "value": list(numbers.values())}] if numbers else []
