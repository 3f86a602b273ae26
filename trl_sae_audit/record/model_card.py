"""A model card's section on what training taught: from the run's record and what was saved beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..io.dictionaries import describe_place
from ..io.feature_labels import caption
from ..io.manifest import read_manifest
from ..text import sanitize
from .leading import LEADINGS, known_leadings

if TYPE_CHECKING:
    from .reader import RunRecord

PathLike = str | os.PathLike[str]


def model_card(
    record: RunRecord,
    *,
    n: int = 5,
    audit: PathLike | None = None,
    filtered: PathLike | None = None,
    shaped: PathLike | None = None,
    verified: PathLike | None = None,
) -> str:
    """Markdown for a model card: the run, the data that was audited, what was filtered or shaped, the features, the verdict.

    Args:
        record: of the run that trained the model.
        n: features shown of either kind.
        audit: directory of the audit of the run's data.
        filtered: directory that the filter wrote.
        shaped: directory of the shaped reward that the run used.
        verified: directory that `verify` wrote.

    Raises:
        AuditError: a directory holds something else, or is damaged.
    """
    dictionaries = ", ".join(
        f"`{_text(each['name'])}` at `{_text(describe_place(each))}` ({each['d_sae']:,} features)"
        for each in record.dictionaries
    )
    parts = [
        "## What training taught",
        f"{record.manifest['trainer']}, {record.last_step:,} optimizer steps from `{_text(record.manifest['model'])}`, observed with "
        "trl-sae-audit in features of a sparse autoencoder: "
        f"{dictionaries}.",
    ]
    if audit is not None:
        parts.append(_of_audit(read_manifest(audit, "audit")))
    if filtered is not None:
        parts.append(_of_filter(read_manifest(filtered, "filtered")))
    if shaped is not None:
        parts.append(_of_shaping(read_manifest(shaped, "shaped_reward")))
    tables = [record.features(dictionary["name"]) for dictionary in record.dictionaries]
    parts += [_table(table, n) for table in tables]
    if verified is not None:
        parts.append(_of_verification(read_manifest(verified, "verification")))
    said = {each.score: each.meaning for table in tables for each in known_leadings(table)}
    said = said if len(said) == 1 else {score: text for score, text in said.items() if score != "attribution"}
    meanings = " ".join(text[0].upper() + text[1:] for text in said.values())
    parts.append(
        f"{meanings} ± is the 95 % interval. A feature is what the autoencoder found: no feature moving is no proof that nothing was "
        "taught."
    )
    return "\n\n".join(parts) + "\n"


def _of_audit(manifest: Mapping[str, Any]) -> str:
    return (
        f"Data: {manifest['rows']:,} examples were audited before training, with the loss `{_text(manifest['loss']['objective'])}` "
        f"(SHA-256 of the rows `{_text(str(manifest['dataset_sha256']))[:16]}…`)."
    )


def _of_filter(manifest: Mapping[str, Any]) -> str:
    summary = manifest["summary"]
    flags = ", ".join(f"“{_text(flag['label'] or str(flag['feature']))}”" for flag in summary["flags"])
    changed = [f"{summary[what]:,} {what}" for what in ("dropped", "flipped", "weighted") if summary[what]]
    return (
        f"Filtered: of {summary['rows']:,} rows {summary['kept']:,} were kept ({', '.join(changed) or 'none changed'}), by the flags "
        f"{flags or 'of no feature'}."
    )


def _of_shaping(manifest: Mapping[str, Any]) -> str:
    return (
        f"Shaped: the reward `{_text(str(manifest['reward']))}` less a penalty on flagged features "
        f"({_text(str(manifest['config']['penalty']))})."
    )


def _of_verification(manifest: Mapping[str, Any]) -> str:
    lines = ["Verified against the model after training, R² of each score with the measured change:", ""]
    for kind, target in manifest["targets"].items():
        scores = {name: found["r2"] for name, found in target["scores"].items() if found["r2"][0] is not None}
        best = sorted(scores, key=lambda name: -scores[name][0])[:3]
        told = ", ".join(
            f"{_text(name.replace('_', ' '))} {scores[name][0]:.2f} ({scores[name][1]:.2f} to {scores[name][2]:.2f})"
            for name in best
        )
        lines.append(f"- {_text(kind)}, {target['prompts']:,} prompts: {told}")
    return "\n".join(lines)


def _table(features: pd.DataFrame, n: int) -> str:
    """The features that moved most, either way, by the score that leads."""
    known = known_leadings(features)
    lead = known[0] if known else LEADINGS[-1]
    features = features.assign(margin=lead.half_width(features))
    order = features[lead.order]
    places = order[order.notna() & (order != 0)].sort_values(kind="stable").index
    shown = dict.fromkeys([*places[::-1][:n], *places[: max(0, min(n, len(places) - n))]])
    others = [each for each in known[1:] if each.score == "selection"]
    head = ["feature", "what it is", lead.heading, "±", *(each.heading for each in others)]
    lines = [head, ["---"] * len(head)]
    for _, row in features.loc[list(shown)].iterrows():
        cells = [
            str(row["feature"]),
            _text(caption(row.to_dict())),
            f"{row[lead.score]:+.3g}",
            f"{row['margin']:.2g}",
            *(f"{row[each.score]:+.3g}" if np.isfinite(row[each.score]) else "–" for each in others),
        ]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(text: str) -> str:
    """Text of others, harmless in a cell of a Markdown table."""
    return sanitize(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
