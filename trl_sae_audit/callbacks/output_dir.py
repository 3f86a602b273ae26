"""A directory of its own for each run of a script, so that none overwrites the model that an earlier run's record names."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .arguments import AttributionArguments

logger = logging.getLogger(__name__)

_OF_A_RUN = ("config.json", "adapter_config.json", f"{PREFIX_CHECKPOINT_DIR}-*")
"""What a run leaves in its output directory: a model, an adapter, checkpoints."""


def take_output_dir(training: TrainingArguments, attribution: AttributionArguments) -> None:
    """Number `training.output_dir` where an earlier run left a model or checkpoints: `runs/dpo`, then `runs/dpo-2`; the log says so.

    It stays as it is with `--record_overwrite`. A run that resumes from a checkpoint goes on in that checkpoint's directory.
    Every process gets the same directory.
    """
    given = Path(training.output_dir).absolute()
    checkpoint = training.resume_from_checkpoint
    if checkpoint:
        resumed = Path(checkpoint).absolute().parent if isinstance(checkpoint, str) else given
        if resumed.parent == given.parent and re.fullmatch(rf"{re.escape(given.name)}-\d+", resumed.name):
            training.output_dir = str(resumed)
        return
    if attribution.record_overwrite:
        return
    [chosen] = broadcast_object_list([_first_free(given)])
    if chosen == given:
        return
    training.output_dir = str(chosen)
    if training.process_index == 0:
        logger.warning(
            "%s has the model or checkpoints of an earlier run, so this run's model, checkpoints and record are in %s; --record_overwrite true "
            "replaces the earlier run.",
            *(given, chosen),
        )


def _first_free(directory: Path) -> Path:
    numbered = (directory.with_name(f"{directory.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([directory], numbered) if not _holds_run(each))


def _holds_run(directory: Path) -> bool:
    return any(any(directory.glob(pattern)) for pattern in _OF_A_RUN)
