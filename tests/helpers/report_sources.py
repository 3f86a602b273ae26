"""Run records and audits made by hand for the tests of the report: small, quick, with everything a page can show."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_sae_audit import FeatureDictionary
from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.audit.evidence_files import Context, Evidence
from trl_sae_audit.record.writer import RecordWriter

HOSTILE = (
    "<script>document.title='owned'</script>\u202e\u2028\u0000\ud800 </script><img src=x onerror=alert(1)> "
)


def make_dictionary(features: int = 64, name: str = "tiny", seed: int = 0) -> FeatureDictionary:
    generator = torch.Generator().manual_seed(seed)
    return FeatureDictionary(torch.randn(features, 16, generator=generator), "model.layers.1", name)


def make_record(
    directory: Path,
    dictionary: FeatureDictionary,
    *,
    steps: int = 48,
    seed: int = 0,
    strength: float = 1.0,
    watch: dict[str, int] | None = None,
    log: dict[str, list[float]] | None = None,
    fvu: float = 0.2,
    epoch: float = 1.0,
    status: str = "finished",
) -> Path:
    """A record in which feature 3 is pushed up from the start, 5 down, and 7 up in the second half only."""
    generator = np.random.default_rng(seed)
    n = dictionary.d_sae
    watch = {"flattery": 3} if watch is None else watch
    attribution = generator.normal(0, 0.05, (steps, n))
    attribution[:, 3] += 0.4 * strength
    attribution[:, 5] -= 0.3 * strength
    attribution[steps // 2 :, 7] += 0.5 * strength
    totals = FeatureTotals(n)
    totals.update(
        attribution,
        0.25 * attribution,
        0.75 * attribution,
        np.full((steps, n), 0.05**2),
        np.square(attribution) / np.square(attribution).sum(1, keepdims=True),
        np.full(steps, 7),
    )
    header: dict[str, Any] = {
        "trainer": "DPOTrainer",
        "model": "somewhere/tiny-model",
        "sides": ["chosen", "rejected"],
        "dictionaries": [asdict(dictionary.info)],
        "config": {
            "watch": {dictionary.name: watch},
            "top_k": 4,
            "arguments": {"beta": 0.1, "learning_rate": 1e-6},
        },
    }
    writer = RecordWriter.create(directory, header)
    step = np.arange(1, steps + 1)
    for label, feature in watch.items():
        writer.append("steps", _step_rows(dictionary.name, step, label, feature, attribution[:, feature]))
    writer.append(
        "gradient",
        {
            "step": step,
            "dictionary": [dictionary.name] * steps,
            "norm": np.linalg.norm(attribution, axis=1),
            "coverage": np.full(steps, 0.6),
            "coverage_random": np.full(steps, 0.25),
            "finite": np.ones(steps, bool),
        },
    )
    writer.append(
        "health",
        {"step": step, "dictionary": [dictionary.name] * steps, "fvu": [fvu] * steps, "token_fvu": [fvu] * steps,
         "l0": [8.0] * steps, "tokens": [64.0] * steps},
    )  # fmt: skip
    for name, values in {"epoch": list(np.linspace(0, epoch, steps)), **(log or {})}.items():
        writer.append("log", {"step": step[: len(values)], "name": [name] * len(values), "value": values})
    writer.flush(steps, {dictionary.name: totals})
    if status != "running":
        writer.close(status, steps, {dictionary.name: totals})
    return directory


def _step_rows(
    dictionary: str, step: np.ndarray, label: str, feature: int, attribution: np.ndarray
) -> dict[str, Any]:
    n = len(step)
    return {
        "step": step,
        "dictionary": [dictionary] * n,
        "feature": [feature] * n,
        "label": [label] * n,
        "attribution": attribution,
        "standard_error": np.full(n, 0.05),
        "positive": 0.25 * attribution,
        "negative": 0.75 * attribution,
    }


def make_evidence(dictionary: FeatureDictionary, feature: int = 3, text: str = "you are right") -> Evidence:
    contexts = [
        Context("strongest", "chosen", 11, 2.5, "what is it ?", "I say ", text, " so"),
        Context("drawn", "generation", -1, 0.5, "", "", "no", ""),
    ]
    return Evidence(
        dictionary.name, feature, "", 1.0, 0.01, ["right", "correct"], ["wrong"], contexts,
        "https://www.neuronpedia.org/m/s/3",
    )  # fmt: skip
