"""The data of the page's script, as JSON whose content cannot end the script element."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pandas as pd

from ..audit.evidence_files import Context, Evidence
from ..text import sanitize_excerpt
from .lead import known_leads, read_lead
from .sources import FeatureContexts

MOST_FEATURES = 65_536
_COLUMNS = (
    "lead", "lead_margin", "lead_q", "clear", "selection", "disparity", "predicted_change", "attribution", "margin", "q_value", "share",
    "lift", "positive", "negative", "trend_tau", "trend_q_value", "length_correlation", "active_examples",
)  # fmt: skip
_LONGEST_TEXT = 300
_MOST_WORDS = 8192
_LONGEST_TOKEN = 40


def encode_json(data: Any) -> str:
    """Encode as JSON for a script element: ASCII only, without characters that have a meaning in HTML."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def encode_floats(values: np.ndarray) -> str:
    """Encode as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def pack_features(features: pd.DataFrame, most: int = MOST_FEATURES) -> dict[str, Any]:
    """Pack the table of all features, the largest leading score first, at most `most` of them.

    Labelled features are always included. Column → base64 of float32; `feature` of uint32.
    """
    score = read_lead(features, known_leads(features)[0])
    features = features.assign(
        lead=score["value"],
        lead_margin=(score["high"] - score["low"]) / 2,
        lead_q=score["q"],
        clear=score["clear"].astype(float),
    )
    order = np.argsort(-score["rank"].to_numpy(), kind="stable")
    if len(order) > most:
        labelled = np.flatnonzero(features["label"].to_numpy() != "")
        order = np.concatenate([order[:most], labelled[~np.isin(labelled, order[:most])]])
    shown_rows = features.iloc[order]
    numbers = shown_rows["feature"].to_numpy().astype("<u4")
    return {
        "count": len(shown_rows),
        "feature": base64.b64encode(numbers.tobytes()).decode(),
        "columns": {
            name: encode_floats(shown_rows[name].to_numpy()) for name in _COLUMNS if name in shown_rows
        },
        "words": {
            str(feature): sanitize_excerpt(words, 100)
            for feature, words in zip(
                shown_rows["feature"][:_MOST_WORDS], shown_rows["words"][:_MOST_WORDS], strict=True
            )
            if words
        },
        "labels": {
            str(feature): sanitize_excerpt(label, 80)
            for feature, label in zip(shown_rows["feature"], shown_rows["label"], strict=True)
            if label
        },
    }


def build_card(evidence: Evidence | None, shown: FeatureContexts | None) -> dict[str, Any]:
    """Build the content of a feature's card, with its texts sanitized and shortened.

    Contexts come with the run record or the audit, vocabulary with the audit; label and link with the evidence, which has both of its own.
    """
    contexts = (shown.contexts if shown else []) or (evidence.contexts if evidence else [])
    words = (shown.words if shown else "") or (evidence.words if evidence else "")
    promotes, suppresses = (
        (vars(shown)[name] if shown else []) or (vars(evidence)[name] if evidence else [])
        for name in ("promotes", "suppresses")
    )
    return {
        "label": sanitize_excerpt(evidence.label, 200) if evidence else "",
        "words": sanitize_excerpt(words, 200),
        "promotes": [sanitize_excerpt(token, _LONGEST_TOKEN) for token in promotes],
        "suppresses": [sanitize_excerpt(token, _LONGEST_TOKEN) for token in suppresses],
        "link": evidence.link
        if evidence and evidence.link and evidence.link.startswith("https://")
        else None,
        "contexts": [_context(context) for context in contexts],
        "density": None if shown is None or shown.density is None else _number(shown.density),
        "histogram": None if shown is None else shown.histogram,
    }


def _context(context: Context) -> dict[str, Any]:
    return {
        "kind": context.kind,
        "source": sanitize_excerpt(context.source, _LONGEST_TOKEN),
        "row": context.row,
        "activation": _number(context.activation),
        "prompt": sanitize_excerpt(context.prompt[-_LONGEST_TEXT:], _LONGEST_TEXT),
        "before": sanitize_excerpt(context.before[-_LONGEST_TEXT:], _LONGEST_TEXT),
        "at": sanitize_excerpt(context.at, _LONGEST_TOKEN),
        "after": sanitize_excerpt(context.after, _LONGEST_TEXT),
    }


def _number(value: float) -> float:
    return float(f"{value:.4g}") if np.isfinite(value) else 0.0
