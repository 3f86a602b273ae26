"""Evidence for what a report shows: a run record knows no texts, so its data is audited once for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from ..audit.api import audit_preferences
from ..audit.evidence import gather_evidence
from ..audit.evidence_files import write_evidence
from ..audit.result import Audit
from ..data.opener import DatasetLike
from ..errors import AuditError
from ..report.lead import known_leads, read_lead
from ..report.sources import ReportSource, View
from ..saes.dictionary import FeatureDictionary

_OF_THE_LOSS = ("loss_type", "beta", "label_smoothing", "max_length")


def gather_for(
    source: ReportSource,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetLike,
    dictionary: FeatureDictionary,
    *,
    features: int = 10,
    labels: Mapping[int, str] | None = None,
) -> Path:
    """Gather evidence for the leading features of a report, and store it with the source.

    For a run its data is audited first, into the directory `audit` in the record's own, which the report then also takes
    disparity and length correlation from; an audit there is used again.

    Args:
        source: a run on preference pairs, or an audit of them.
        model: the one the run began with, or the audit looked at.
        data: the pairs.
        features: how many of the largest in each direction; watched ones come besides.

    Returns:
        The audit's directory.

    Raises:
        AuditError: a source without this dictionary, or without pairs; data that was not the audit's.
    """
    view = _view_of(source, dictionary)
    config = DPOConfig("unused", bf16=False, report_to="none", **_loss_settings(source))
    if source.kind == "audit":
        audit = Audit.load(source.directory)
    else:
        if source.sides != ("chosen", "rejected"):
            raise AuditError(
                f"Evidence is gathered from preference pairs, and {source.directory} is the record of a run without "
                "chosen and rejected sides; omit --evidence."
            )
        directory = source.directory / "audit"
        audit = audit_preferences(
            model,
            tokenizer,
            data,
            dictionary,
            args=config,
            output_dir=directory,
            on_bad_row="set_aside",
            lookahead=None,
        )
    chosen = _leading_features(view, features)
    evidence = gather_evidence(audit, chosen, model, tokenizer, dictionary, labels=labels)
    write_evidence(source.directory, evidence)
    return audit.directory


def _view_of(source: ReportSource, dictionary: FeatureDictionary) -> View:
    for view in source.views:
        if view.described["identity"] == dictionary.identity:
            return view
    raise AuditError(
        f"{source.directory} was made with {', '.join(view.name for view in source.views)}, not with the dictionary "
        f"{dictionary.name!r}; pass the same one."
    )


def _loss_settings(source: ReportSource) -> dict[str, Any]:
    manifest = source.manifest
    described = manifest["config"].get("arguments", {}) if source.kind == "run" else manifest["loss"]
    return {name: described[name] for name in _OF_THE_LOSS if described.get(name) is not None}


def _leading_features(view: View, count: int) -> list[int]:
    """The watched features, and in each direction those that the report puts in front."""
    score = read_lead(view.features, known_leads(view.features)[0])
    score = score[score["rank"] >= 0].sort_values("rank", ascending=False, kind="stable")
    largest = [feature for sign in (1, -1) for feature in score.index[sign * score["value"] > 0][:count]]
    return list(dict.fromkeys([*view.watched.values(), *(int(feature) for feature in largest)]))
