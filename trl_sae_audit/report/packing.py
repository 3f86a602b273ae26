"""What the page's script needs, as JSON that nothing in it can break out of."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..evidence_files import Evidence, Example, Token
from .text import shown

MOST_FEATURES = 65_536
_COLUMNS = (
    "attribution", "margin", "share", "lift", "q_value", "chosen", "rejected", "trend_tau", "trend_q_value",
    "length_correlation", "disparity", "predicted_change", "active_examples",
)  # fmt: skip
_MOST_TOKENS = 120
_LONGEST_TOKEN = 40


def as_json(data: Any) -> str:
    """JSON for a script element: ASCII only, and without a character that means something in HTML."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def base64_floats(values: np.ndarray) -> str:
    """float32, little endian, base64."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def packed_features(features: pd.DataFrame, most: int = MOST_FEATURES) -> dict[str, Any]:
    """The columns of the table of all features, largest |attribution| first, at most `most` of them.

    A labelled feature is in it whatever its size. Column → base64 of float32; `feature` of uint32.
    """
    size = features["attribution"].abs().to_numpy()
    order = np.argsort(-np.nan_to_num(size), kind="stable")
    if len(order) > most:
        labelled = np.flatnonzero(features["label"].to_numpy() != "")
        order = np.concatenate([order[:most], labelled[~np.isin(labelled, order[:most])]])
    shown_rows = features.iloc[order]
    numbers = shown_rows["feature"].to_numpy().astype("<u4")
    return {
        "count": len(shown_rows),
        "feature": base64.b64encode(numbers.tobytes()).decode(),
        "columns": {
            name: base64_floats(shown_rows[name].to_numpy()) for name in _COLUMNS if name in shown_rows
        },
        "labels": {
            str(feature): shown(label, 80)
            for feature, label in zip(shown_rows["feature"], shown_rows["label"], strict=True)
            if label
        },
    }


def card(evidence: Evidence) -> dict[str, Any]:
    """What a card shows of the evidence, its texts made harmless and short."""
    return {
        "label": shown(evidence.label, 200),
        "promotes": [shown(token, _LONGEST_TOKEN) for token in evidence.promotes],
        "suppresses": [shown(token, _LONGEST_TOKEN) for token in evidence.suppresses],
        "link": evidence.link if evidence.link and evidence.link.startswith("https://") else None,
        "examples": [_example(example) for example in evidence.examples],
    }


def _example(example: Example) -> dict[str, Any]:
    return {
        "row": example.row,
        "attribution": _number(example.attribution),
        "prompt": shown(example.prompt, 600),
        "answers": [
            {
                "side": side,
                **_tokens(tokens),
                "text": "" if tokens else shown(example.answers.get(side, ""), 600),
            }
            for side, tokens in example.tokens.items()
        ],
    }


def _tokens(tokens: list[Token]) -> Mapping[str, Any]:
    """The tokens around the one with the largest part, and how many are left out before and after."""
    sizes = [abs(token.attribution) for token in tokens]
    centre = sizes.index(max(sizes)) if sizes else 0
    start = max(0, min(centre - _MOST_TOKENS // 2, len(tokens) - _MOST_TOKENS))
    kept = tokens[start : start + _MOST_TOKENS]
    return {
        "before": start,
        "after": len(tokens) - start - len(kept),
        "tokens": [shown(token.text, _LONGEST_TOKEN) for token in kept],
        "activation": [_number(token.activation) for token in kept],
        "attribution_of": [_number(token.attribution) for token in kept],
    }


def _number(value: float) -> float:
    return float(f"{value:.4g}") if np.isfinite(value) else 0.0
