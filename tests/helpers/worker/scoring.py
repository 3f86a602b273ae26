"""A scorer calibrated by all processes together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from helpers.worlds import make_dictionary, make_model, make_tokenizer

from trl_sae_audit import FeatureScorer


def scorer(directory: Path) -> dict[str, Any]:
    """Calibrated on 4 texts that count, for a first token does not; in 4 processes two have none of them."""
    PartialState(cpu=True)
    tokenizer = make_tokenizer()
    texts = ["w1 w2 w3", "w9 w4", "w20", "", "w7 w8 w9 w10", "w33 w1"]
    scores = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary()).calibrate(texts, shared=True)
    return {"size": scores.calibration_size, "mean": scores.mean, "deviation": scores.deviation}
