"""The sources of a report: run records and audits, read into the same form."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype, is_string_dtype
from scipy.stats import t as student_t

from ..audit.evidence_files import Context, Evidence, contexts_in, read_evidence
from ..errors import AuditError
from ..io.feature_labels import captions
from ..io.manifest import MANIFEST, kind_of, read_manifest, reading
from ..outcomes import Outcome, read_outcomes
from ..record.over_time import OverTime, read_over_time
from ..record.reader import RunRecord
from ..record.rollouts import ACTIVATIONS, ROLLOUTS, TOKENS, Rollout, read_rollouts
from ..record.rollouts import COLUMNS as ROLLOUT_COLUMNS
from ..statistics import NORMAL_QUANTILE
from ..text import sanitize

_NUMBERS = {
    "steps": ("step", "feature", "attribution", "standard_error"),
    "gradient": ("step", "norm", "coverage", "coverage_random"),
    "health": ("step", "fvu", "token_fvu", "l0"),
    "drift": ("step", "drift"),
    "log": ("step", "value"),
}
"""The numeric columns that a page reads from a run's tables. It also reads `dictionary` (all but the log), `label` (drift), `name` (log) and `finite` (gradient)."""
_CARDS = 150
"""Features in front, by each score that orders a table, whose cards have contexts."""
_AUDIT_COLUMNS = ("length_correlation", "length_q_value", "disparity", "active_examples", "predicted_change")


@dataclass(frozen=True)
class View:
    """One dictionary of a source.

    Attributes:
        described: name, identity, hook_point, d_sae, d_model, neuronpedia_id …
        features: one row per feature, in the dictionary's order. `margin` is half the width of the attribution's 95 %
            interval; `per_step` and `per_step_margin` are the mean over steps (for an audit: the same numbers).
        watched: label → feature.
        over_time: "generation_drift" (in standard deviations over answers, after two looks), "selection", "activation" (in rollouts, against
            the first of them) and "attribution" → how it went; what the run recorded of these. Empty for an audit.
        tables: steps, gradient, health and drift, as far as they exist.
    """

    described: Mapping[str, Any]
    features: pd.DataFrame
    watched: dict[str, int] = field(default_factory=dict)
    over_time: Mapping[str, OverTime] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    steps: int = 1

    @property
    def name(self) -> str:
        return self.described["name"]


@dataclass(frozen=True)
class FeatureContexts:
    """What a feature is active on.

    Attributes:
        words: its line of words.
        contexts: the strongest first.
        density: share of the tokens on which it is active; None where that is not known.
        promotes, suppresses: tokens that its direction raises and lowers most; empty where that is not known.
        histogram: of its largest activation in each answer: upper end of the bins, and answers of each side; None where not known.
    """

    words: str
    contexts: list[Context]
    density: float | None = None
    histogram: dict[str, Any] | None = None
    promotes: list[str] = field(default_factory=list)
    suppresses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReportSource:
    """A run record or an audit.

    Attributes:
        name: what the report calls it.
        kind: "run" or "audit".
        status: of the run or audit: finished, running, failed.
        amount: optimizer steps of a run, examples of an audit.
        sides: names of the loss's two sides; None if it has none.
        views: one per dictionary.
        log: the trainer's own log, columns step, name, value; None for an audit.
        evidence: (dictionary, feature) → vocabulary and label.
        contexts: (dictionary, feature) → words and contexts of the features in front.
        rollouts: answers of the first and of the last steps of a run on the model's own.
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
    contexts: Mapping[tuple[str, int], FeatureContexts] = field(default_factory=dict)
    rollouts: Sequence[Rollout] = ()


def open_source(path: str | os.PathLike[str], name: str | None = None) -> ReportSource:
    """Read a run record or an audit, whichever is in the directory `path`.

    Raises:
        AuditError: there is neither, or it cannot be read.
    """
    directory = Path(path)
    read = {"run": _read_run, "audit": _read_audit}[kind_of(directory, "run", "audit")]
    return read(directory, name or directory.resolve().name)


def has_begun(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything to show yet. A run writes its first figures some time after its first step.

    Raises:
        AuditError: as `open_source`.
    """
    manifest = read_manifest(path, "run", "audit")
    return manifest["kind"] == "audit" or manifest["status"] != "running" or bool(manifest.get("files"))


def add_audit(source: ReportSource, audit: ReportSource) -> ReportSource:
    """Add to the features of `source` what only an audit of its data knows: disparity, length correlation, evidence.

    Raises:
        AuditError: the audit was made with another dictionary.
    """
    by_identity = {view.described["identity"]: view for view in audit.views}
    views, joined = [], False
    for view in source.views:
        other = by_identity.get(view.described["identity"])
        if other is None:
            views.append(view)
            continue
        joined = True
        columns = [name for name in _AUDIT_COLUMNS if name in other.features and name not in view.features]
        features = view.features.assign(**{name: other.features[name].to_numpy() for name in columns})
        views.append(replace(view, features=features))
    if not joined:
        raise AuditError(
            f"The audit in {audit.directory} was made with dictionary {audit.views[0].name!r}, which {source.directory} does "
            "not use. Pass an audit made with the same dictionary."
        )
    return replace(
        source,
        views=views,
        evidence={**audit.evidence, **source.evidence},
        contexts={**source.contexts, **audit.contexts},
    )


def _read_run(directory: Path, name: str) -> ReportSource:
    record = RunRecord.load(directory)
    tables = {each: _read_table(record, each) for each in _NUMBERS if each in record.tables}
    log = tables.pop("log", None)
    views = []
    contexts: dict[tuple[str, int], FeatureContexts] = {}
    for described in record.dictionaries:
        own = described["name"]
        totals = record.totals(own)
        watched = record.manifest.get("config", {}).get("watch", {}).get(own, {})
        frame = _add_margins(_read_frame(record, own, totals.frame(described["d_model"])), watched)
        front = _leading(frame, watched.values())
        rows = record.contexts(front, own).assign(kind="strongest", row=-1)
        contexts |= _contexts_of(own, front, frame, rows)
        views.append(
            View(
                described,
                frame,
                watched,
                read_over_time(record, own, totals),
                {each: rows[rows["dictionary"] == own] for each, rows in tables.items() if len(rows)},
                max(totals.attribution.finite_steps, 1),
            )
        )
    sides = record.manifest.get("sides")
    return ReportSource(
        name,
        "run",
        directory,
        record.manifest,
        record.status,
        record.last_step,
        (sanitize(sides[0]), sanitize(sides[1])) if sides else None,
        views,
        read_outcomes(directory),
        read_evidence(directory),
        log,
        contexts,
        _read_rollouts(record),
    )


def _read_rollouts(record: RunRecord) -> list[Rollout]:
    names = (ROLLOUTS, TOKENS, ACTIVATIONS)
    if not set(names) <= set(record.tables):
        return []
    tables = [record.table(name) for name in names]
    with reading(record.directory / MANIFEST):
        for name, table in zip(names, tables, strict=True):
            missing = {"step", *ROLLOUT_COLUMNS[name]} - set(table)
            if missing:
                raise ValueError(f"table {name!r} has no column {min(missing)!r}")
        return read_rollouts(*tables)


def _read_table(record: RunRecord, name: str) -> pd.DataFrame:
    rows = record.table(name)
    texts = {"log": ("name",), "drift": ("dictionary", "label")}.get(name, ("dictionary",))
    numbers = (*_NUMBERS[name], *(("positive", "negative") if name == "steps" and record.sides else ()))
    kinds = {
        "numbers": (numbers, is_numeric_dtype),
        "texts": (texts, is_string_dtype),
        "truth values": (("finite",) if name == "gradient" else (), is_bool_dtype),
    }
    for kind, (columns, right) in kinds.items() if len(rows) else ():
        for column in columns:
            if column not in rows or not right(rows[column].dtype):
                raise AuditError(
                    f"Table {name!r} of the record in {record.directory} has no column {column!r} of {kind}; read it with the "
                    "release that wrote it."
                )
    return rows


def _read_frame(record: RunRecord, dictionary: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The totals with each feature's label and words, and the last look at generations where the run had any."""
    shown = record.features(dictionary).set_index("feature")
    looks = [str(name) for name in shown if str(name).startswith("generation_")]
    shown = shown.assign(
        **record.labels(dictionary).columns(shown.index)
    )  # what a feature is watched as is shown beside
    return frame.join(shown[looks].assign(words=captions(shown)), on="feature")


def _add_margins(frame: pd.DataFrame, watched: Mapping[str, int]) -> pd.DataFrame:
    quantile = student_t.ppf(0.975, frame["degrees_of_freedom"].to_numpy())
    margin = np.where(np.isfinite(quantile), quantile, NORMAL_QUANTILE) * frame["standard_error"]
    return frame.assign(margin=margin, label=_label_features(len(frame), watched))


def _label_features(features: int, watched: Mapping[str, int]) -> list[str]:
    labels = [""] * features
    for label, feature in watched.items():
        labels[feature] = f"{labels[feature]}, {label}" if labels[feature] else label
    return labels


def _read_audit(directory: Path, name: str) -> ReportSource:
    from ..audit.result import Audit  # imports torch

    audit = Audit.load(directory)
    frame = audit.features().sort_values("feature", ignore_index=True)
    margin = NORMAL_QUANTILE * frame["standard_error"]
    first, second = (*audit.sides, None)[:2]
    names = {first: "positive"} if second is None else {first: "positive", second: "negative"}
    frame = frame.rename(columns=names).assign(margin=margin, words=captions(frame), label="")
    name_of, front = audit.dictionary.name, _leading(frame, ())
    contexts = _contexts_of(name_of, front, frame, audit.contexts(front))
    if audit.manifest["settings"]["activations"] and contexts:
        activity = audit.activity(front).groupby("feature")
        contexts = {
            (own, feature): _with_activity(found, activity.get_group(feature), audit.sides)
            for (own, feature), found in contexts.items()
        }
    tokens = {key: list(rows) for key, rows in audit.vocabulary(front).groupby(["feature", "kind"])["token"]}
    contexts = {
        (own, feature): replace(
            found,
            promotes=tokens.get((feature, "promoted"), []),
            suppresses=tokens.get((feature, "suppressed"), []),
        )
        for (own, feature), found in contexts.items()
    }
    return ReportSource(
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
        contexts=contexts,
    )


def _leading(frame: pd.DataFrame, watched: Iterable[int]) -> list[int]:
    """The features that get a card with contexts: the watched ones, and those in front by any score that orders a table."""
    found = [int(feature) for feature in watched]
    for score in ("effect_size", "selection_z", "selection", "attribution"):
        if score in frame:
            size = frame[score].abs().fillna(-1).to_numpy()
            order = np.argsort(-size, kind="stable")[:_CARDS]
            found += [int(feature) for feature in frame["feature"].to_numpy()[order]]
    return list(dict.fromkeys(found))


def _contexts_of(
    dictionary: str, features: Iterable[int], frame: pd.DataFrame, rows: pd.DataFrame
) -> dict[tuple[str, int], FeatureContexts]:
    words = frame.set_index("feature")["words"]
    groups = {feature: rows[rows["feature"] == feature] for feature in set(rows["feature"].tolist())}
    return {
        (dictionary, feature): FeatureContexts(str(words[feature]), contexts_in(groups[feature]))
        for feature in features
        if feature in groups
    }


def _with_activity(found: FeatureContexts, activity: pd.DataFrame, sides: Sequence[str]) -> FeatureContexts:
    histogram = {
        "upper": [float(f"{value:.3g}") for value in activity["high"]],
        "sides": {side: [int(count) for count in activity[side]] for side in sides},
    }
    return replace(found, density=float(activity["density"].iloc[0]), histogram=histogram)
