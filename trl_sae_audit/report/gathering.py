"""Evidence for what a report shows: a run record knows no texts, so its data is audited once for them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from ..audit import audit_preferences
from ..audit_result import Audit
from ..dictionary import FeatureDictionary
from ..errors import AuditError
from ..evidence import gather_evidence
from ..evidence_files import write_evidence
from ..objectives import PreferenceLoss
from ..preferences import Source as Data
from ..preferences import iterate_rows
from .sources import Source, View

_OF_THE_LOSS = ("loss_type", "beta", "label_smoothing", "max_length")


def gather_for(
    source: Source,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    dictionary: FeatureDictionary,
    *,
    features: int = 10,
    max_rows: int | None = None,
    labels: Mapping[int, str] | None = None,
) -> Path:
    """Gather evidence for the features a report puts in front, and keep it beside the source.

    For a run its data is audited first, into the directory `audit` in the record's own, which the report then also takes
    disparity and length correlation from; an audit there is used again.

    Args:
        source: a run on preference pairs, or an audit of them.
        model: the one the run began with, or the audit looked at.
        data: the pairs.
        features: how many of the largest in each direction; watched ones come besides.
        max_rows: of a run's data, look at the first that many only.

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
                "chosen and rejected sides; leave --evidence away."
            )
        if max_rows is not None:
            data = [dict(row.columns) for row in islice(iterate_rows(data), max_rows) if row.columns]
        directory = source.directory / "audit"
        audit = audit_preferences(
            model, tokenizer, data, dictionary, args=config, output_dir=directory, on_bad_row="set_aside"
        )
    chosen = _in_front(view, features)
    found = gather_evidence(
        audit, chosen, model, tokenizer, data, dictionary, PreferenceLoss(tokenizer, config), labels=labels
    )
    write_evidence(source.directory, found)
    return audit.directory


def _view_of(source: Source, dictionary: FeatureDictionary) -> View:
    for view in source.views:
        if view.described["identity"] == dictionary.identity:
            return view
    raise AuditError(
        f"{source.directory} was made with {', '.join(view.name for view in source.views)}, not with the dictionary "
        f"{dictionary.name!r}; pass the same one."
    )


def _loss_settings(source: Source) -> dict[str, Any]:
    described = source.manifest.get("arguments" if source.kind == "run" else "loss", {})
    return {name: described[name] for name in _OF_THE_LOSS if described.get(name) is not None}


def _in_front(view: View, count: int) -> list[int]:
    frame = view.features
    largest = [*frame["attribution"].nlargest(count).index, *frame["attribution"].nsmallest(count).index]
    return list(dict.fromkeys([*view.watched.values(), *(int(feature) for feature in largest)]))
