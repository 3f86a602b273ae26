"""What a report is about: run records and audits, read into one shape."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype, is_string_dtype
from scipy.stats import t as student_t

from ..errors import AuditError
from ..evidence_files import Evidence, read_evidence
from ..outcomes import Outcome, read_outcomes
from ..record import RunRecord
from ..record_manifest import MANIFEST, read_manifest
from ..untrusted import read_json

_NUMBERS = {
    "steps": ("step", "feature", "attribution", "standard_error"),
    "gradient": ("step", "norm", "coverage", "coverage_random", "finite"),
    "health": ("step", "fvu", "token_fvu", "l0"),
    "drift": ("step", "drift"),
    "log": ("step", "value"),
}
"""What a page reads of a run's tables; besides, `dictionary` of all but the log, `label` of the drift and `name` of the log."""
_OF_THE_AUDIT = ("length_correlation", "length_q_value", "disparity", "active_examples", "predicted_change")


@dataclass(frozen=True)
class View:
    """One dictionary of a source.

    Attributes:
        described: name, identity, hook_point, d_sae, d_model, neuronpedia_id …
        features: one row a feature in the dictionary's order; has `margin`, half the width of the attribution's 95 %
            interval, and `per_step` and `per_step_margin`, the same for the mean over steps (of an audit: itself).
        watched: label → feature.
        bins: (first, last) step of each time bin [bins, 2]; None for an audit.
        means: mean attribution a step in each bin [bins, F]; None for an audit.
        tables: steps, gradient, health, drift; those there are.
    """

    described: Mapping[str, Any]
    features: pd.DataFrame
    watched: dict[str, int] = field(default_factory=dict)
    bins: np.ndarray | None = None
    means: np.ndarray | None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.described["name"]


@dataclass(frozen=True)
class Source:
    """A run record or an audit.

    Attributes:
        name: what the report calls it.
        kind: "run" or "audit".
        status: of the run or audit: finished, running, failed.
        amount: optimizer steps of a run, examples of an audit.
        sides: names of the loss's two sides; None where it has none.
        views: one a dictionary.
        log: the trainer's own log, columns step, name, value; None for an audit.
        evidence: (dictionary, feature) → what there is to look at.
    """

    name: str
    kind: str
    directory: Path
    manifest: Mapping[str, Any]
    status: str
    amount: int
    sides: tuple[str, str] | None
    views: list[View]
    outcomes: list[Outcome]
    evidence: Mapping[tuple[str, int], Evidence]
    log: pd.DataFrame | None = None


def open_source(path: str | os.PathLike[str], name: str | None = None) -> Source:
    """Read a run record or an audit, whichever lies in the directory `path`.

    Raises:
        AuditError: neither is there, or what is there cannot be read.
    """
    directory = Path(path)
    kind = _kind(directory)
    return (_run if kind == "run" else _audit)(directory, name or directory.resolve().name)


def has_begun(path: str | os.PathLike[str]) -> bool:
    """Whether there is something to show yet: a run writes its first figures some time after its first step.

    Raises:
        AuditError: as `open_source`.
    """
    directory = Path(path)
    if _kind(directory) == "audit":
        return True
    manifest = read_manifest(directory)
    return bool(manifest.totals) or manifest.status != "running"


def with_audit(source: Source, audit: Source) -> Source:
    """`source` with what only an audit of its data knows beside its features: disparity, length, evidence.

    Raises:
        AuditError: the audit is of another dictionary.
    """
    by_identity = {view.described["identity"]: view for view in audit.views}
    views, joined = [], False
    for view in source.views:
        other = by_identity.get(view.described["identity"])
        if other is None:
            views.append(view)
            continue
        joined = True
        columns = [name for name in _OF_THE_AUDIT if name in other.features and name not in view.features]
        features = view.features.assign(**{name: other.features[name].to_numpy() for name in columns})
        views.append(View(view.described, features, view.watched, view.bins, view.means, view.tables))
    if not joined:
        raise AuditError(
            f"The audit in {audit.directory} was made with dictionary {audit.views[0].name!r}, which {source.directory} does "
            "not have; give an audit made with the same one."
        )
    merged = {**audit.evidence, **source.evidence}
    return _replaced(source, views=views, evidence=merged)


def _replaced(source: Source, **changes: Any) -> Source:
    return Source(**{**vars(source), **changes})


def _kind(directory: Path) -> str:
    path = directory / MANIFEST
    try:
        manifest = read_json(path)
    except OSError as error:
        raise AuditError(
            f"{directory} holds neither a run record nor an audit: {MANIFEST} cannot be read ({error.strerror}). Pass the "
            "output_dir of a run's callback or of an audit."
        ) from error
    except ValueError as error:
        raise AuditError(
            f"{path} is damaged, it cannot be read as JSON ({error}); restore it from a copy."
        ) from error
    return "audit" if isinstance(manifest, dict) and "schema" in manifest else "run"


def _run(directory: Path, name: str) -> Source:
    record = RunRecord.load(directory)
    tables = {each: _table(record, each) for each in _NUMBERS if each in record.tables}
    log = tables.pop("log", None)
    views = []
    for described in record.dictionaries:
        own = described["name"]
        totals = record.totals(own)
        curriculum = totals.curriculum.frame()
        watched = record.manifest.get("watch", {}).get(own, {})
        views.append(
            View(
                described,
                _run_features(totals.frame(described["d_model"]), watched, totals.finite_steps),
                watched,
                np.array(curriculum.index.tolist()).reshape(-1, 2),
                curriculum.to_numpy(),
                {each: rows[rows["dictionary"] == own] for each, rows in tables.items() if len(rows)},
            )
        )
    sides = record.manifest.get("sides")
    return Source(
        name,
        "run",
        directory,
        record.manifest,
        record.status,
        record.last_step,
        tuple(sides) if sides else None,
        views,
        read_outcomes(directory),
        read_evidence(directory),
        log,
    )


def _table(record: RunRecord, name: str) -> pd.DataFrame:
    rows = record.table(name)
    texts = {"log": ("name",), "drift": ("dictionary", "label")}.get(name, ("dictionary",))
    for column in (*_NUMBERS[name], *texts) if len(rows) else ():
        right = is_numeric_dtype if column in _NUMBERS[name] else is_string_dtype
        if column not in rows or not right(rows[column].dtype):
            raise AuditError(
                f"Table {name!r} of the record in {record.directory} has no {column!r} that is a column of "
                f"{'numbers' if right is is_numeric_dtype else 'texts'}; read it with the release that wrote it."
            )
    return rows


def _run_features(frame: pd.DataFrame, watched: Mapping[str, int], steps: int) -> pd.DataFrame:
    quantile = student_t.ppf(0.975, frame["degrees_of_freedom"].to_numpy())
    margin = np.where(np.isfinite(quantile), quantile, 1.96) * frame["standard_error"]
    scale = 1 / max(steps, 1)
    return frame.assign(
        margin=margin,
        per_step=frame["attribution"] * scale,
        per_step_margin=margin * scale,
        label=_labels(len(frame), watched),
    )


def _labels(features: int, watched: Mapping[str, int]) -> list[str]:
    labels = [""] * features
    for label, feature in watched.items():
        labels[feature] = f"{labels[feature]}, {label}" if labels[feature] else label
    return labels


def _audit(directory: Path, name: str) -> Source:
    from ..audit_result import Audit  # imports torch

    audit = Audit.load(directory)
    frame = audit.features().sort_values("feature", ignore_index=True)
    margin = 1.96 * frame["standard_error"]
    first, second = (*audit.sides, None)[:2]
    names = {first: "chosen"} if second is None else {first: "chosen", second: "rejected"}
    frame = frame.rename(columns=names).assign(
        margin=margin, per_step=frame["attribution"], per_step_margin=margin, label=""
    )
    return Source(
        name,
        "audit",
        directory,
        audit.manifest,
        audit.manifest["status"],
        len(audit),
        None if second is None else (first, second),
        [View(audit.manifest["dictionary"], frame)],
        read_outcomes(directory),
        read_evidence(directory),
    )
