"""Whether the model in the place that a run's record names is the one that this run trained."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import AuditError
from ..io.manifest import reading
from ..models.weight_sample import differing_parameter
from ..record.columns import WEIGHTS
from ..record.reader import RunRecord

_MODEL_FILES = ("config.json", "adapter_config.json")


def check_saved(record: RunRecord, place: str, option: str) -> None:
    """Refuse to look for the model of a run that saved none where its record says.

    Args:
        record: of the run.
        place: of its model, as the record says.
        option: with which the user names another.

    Raises:
        AuditError: the run trains still, was killed, or failed; or its trainer was not told to save.
    """
    if record.status != "finished":
        raise AuditError(
            f"The run in {record.directory} has not finished (it is {record.status!r}, at step {record.last_step}), so its record names "
            f"no model after it; give one, such as its latest checkpoint, as {option}."
        )
    if not any((Path(place) / name).is_file() for name in _MODEL_FILES):
        raise AuditError(
            f"The run in {record.directory} trained into {place}, but there is no model: trainer.save_model() saves it there; if it is "
            f"elsewhere, give it as {option}."
        )


def check_trained(record: RunRecord, model: nn.Module, place: str, option: str) -> None:
    """Refuse a model with other weights than the run ended with; a record without them, as of a sharded run, tells nothing.

    Args:
        record: of the run.
        model: that was loaded.
        place: where from, as the record says.
        option: with which the user names another.

    Raises:
        AuditError: it is another one.
    """
    if WEIGHTS not in record.tables:
        return
    table = record.table(WEIGHTS)
    with reading(record.directory / WEIGHTS):
        name = differing_parameter(
            model, {column: table[column].tolist() for column in ("parameter", "place", "value")}
        )
    if name is not None:
        raise AuditError(
            f"The model in {place} is not the one that the run in {record.directory} ended with ({name} has other weights): another "
            f"run was saved over it, or it was trained further. Give the model of this run as {option}."
        )
