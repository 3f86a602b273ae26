"""Outcomes: what a model does, measured with intervals and stored with a run record or an audit for report and compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .errors import AuditError
from .io.atomic import sync_directory, write_durably
from .io.manifest import document, read_document

FILE = "outcomes.json"
WANTED = ("up", "down", "")
UNITS = ("share", "")
STAGES = ("before", "after")
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Outcome:
    """One measure of one model.

    Args:
        measure: a short name; the same in every run that is compared.
        estimate: the value.
        low, high: ends of its 95 % interval; None if it has none.
        n: how many observations it rests on; None if that means nothing.
        label: what to call it in words: "agrees with the user's wrong belief". Default: the measure.
        stage: "after" training, or "before": of the model the run began with.
        wanted: "up" if more of it is better, "down" if less is, "" if neither.
        unit: "share" for a rate between 0 and 1, shown in percent; "" for any other number.

    Raises:
        AuditError: for a value that cannot be meant.
    """

    measure: str
    estimate: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    label: str = ""
    stage: Literal["before", "after"] = "after"
    wanted: Literal["up", "down", ""] = ""
    unit: Literal["share", ""] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.measure, str) or not self.measure.strip():
            raise AuditError(f"An outcome has measure {self.measure!r}; give it a short name.")
        if not isinstance(self.label, str):
            raise AuditError(f"Outcome {self.measure!r} has label {self.label!r}; give text.")
        for name in ("estimate", "low", "high"):
            value = getattr(self, name)
            if value is None and name != "estimate":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
                raise AuditError(f"Outcome {self.measure!r} has {name} {value!r}; give a finite number.")
        if (self.low is None) != (self.high is None):
            raise AuditError(
                f"Outcome {self.measure!r} has one end of an interval; give low and high, or neither."
            )
        if self.low is not None and self.high is not None and not self.low <= self.estimate <= self.high:
            raise AuditError(
                f"Outcome {self.measure!r} is {self.estimate:g}, outside its interval {self.low:g} to {self.high:g}; "
                "low and high are the ends themselves, not distances."
            )
        if self.n is not None and (isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 0):
            raise AuditError(f"Outcome {self.measure!r} has n {self.n!r}; give a count.")
        for name, allowed in (("stage", STAGES), ("wanted", WANTED), ("unit", UNITS)):
            if getattr(self, name) not in allowed:
                raise AuditError(
                    f"Outcome {self.measure!r} has {name} {getattr(self, name)!r}; give one of "
                    f"{', '.join(repr(value) for value in allowed)}."
                )

    @property
    def name(self) -> str:
        """The label, or where there is none the measure."""
        return self.label or self.measure

    def text(self, value: float | None = None) -> str:
        """`value`, by default the estimate, as people read it."""
        value = self.estimate if value is None else value
        return f"{value:.0%}" if self.unit == "share" else f"{value:.3g}"


def write_outcomes(
    directory: str | os.PathLike[str], outcomes: Iterable[Outcome | Mapping[str, Any]]
) -> Path:
    """Write `outcomes.json` into the directory of a run record or an audit, the whole file or none of it.

    Args:
        directory: of a run record or an audit, finished or not.
        outcomes: `Outcome`s, or mappings with its arguments. They replace what was there.

    Raises:
        AuditError: an outcome that cannot be meant, one given twice, or a directory that cannot be written.
    """
    checked = _unique([_outcome(entry) for entry in outcomes])
    path = Path(directory) / FILE
    content = document("outcomes", {"outcomes": [asdict(outcome) for outcome in checked]})
    try:
        write_durably(path, content)
        sync_directory(path.parent)
    except OSError as error:
        raise AuditError(f"{path} could not be written ({error.strerror}); check the directory.") from error
    return path


def read_outcomes(directory: str | os.PathLike[str]) -> list[Outcome]:
    """What `write_outcomes` wrote; an empty list where it never did.

    Raises:
        AuditError: the file is damaged, or of an unknown format.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return []
    entries = read_document(path, "outcomes").get("outcomes")
    if not isinstance(entries, list):
        raise AuditError(f"{path} has no list 'outcomes'; write it with write_outcomes.")
    try:
        return _unique([_outcome(entry) for entry in entries])
    except AuditError as error:
        raise AuditError(f"{path}: {error}") from error


def _outcome(entry: Outcome | Mapping[str, Any]) -> Outcome:
    if isinstance(entry, Outcome):
        return entry
    if not isinstance(entry, Mapping):
        raise AuditError(f"An outcome is a {type(entry).__name__}; give an Outcome or a mapping.")
    known = {field.name for field in fields(Outcome)}
    unknown = sorted(map(str, set(entry) - known))
    if unknown:
        raise AuditError(f"An outcome has {unknown[0]!r}; it takes {', '.join(sorted(known))}.")
    missing = {"measure", "estimate"} - set(entry)
    if missing:
        raise AuditError(f"An outcome has no {sorted(missing)[0]}; add it.")
    values = {key: _as_python(value) for key, value in entry.items()}
    return Outcome(**values)


def _as_python(value: Any) -> Any:
    """Numpy's and torch's scalars as Python's."""
    return value.item() if not isinstance(value, (int, float, str)) and hasattr(value, "item") else value


def _unique(outcomes: list[Outcome]) -> list[Outcome]:
    seen: set[tuple[str, str]] = set()
    for outcome in outcomes:
        if (outcome.measure, outcome.stage) in seen:
            raise AuditError(
                f"Outcome {outcome.measure!r} {outcome.stage} training is given twice; keep one."
            )
        seen.add((outcome.measure, outcome.stage))
    return outcomes
