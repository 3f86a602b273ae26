"""What the trainer's own log shows: names and numbers under the prefix `sae/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..metric_names import feature_metric

if TYPE_CHECKING:
    from ..attribution.feature_tracker import FeatureTracker
    from .generations import Look


def of_tracker(
    tracker: FeatureTracker, prefix: str, sides: tuple[str, str] | None, log_top: int
) -> dict[str, float]:
    """Means over the optimizer steps since the last log; empty if there was none.

    `{prefix}/{label}/attribution`, `/share` and one entry for each side, and `/selection` where it is known, with
    `/activation` and `/frequency` in the responses where these are the model's own; `{prefix}/top{n}/feature`,
    `/selection` and `/attribution` for the features that are selected for or against most in units of the standard error, or,
    where selection is not known, have the largest mean attribution; `{prefix}/grad_norm`, ‖G‖;
    `{prefix}/coverage`, the part of ‖G‖² the step's top features span; `{prefix}/fvu`,
    `/token_fvu` and `/l0`, see Health.
    """
    window = tracker.take_window()
    logged: dict[str, float] = {}
    if window is not None:
        logged |= {f"{prefix}/grad_norm": window.norm, f"{prefix}/coverage": window.coverage}
        scores = window.scores
        shown = {"attribution": scores["attribution"], "share": scores["share"]}
        if sides is not None:
            shown |= {sides[0]: scores["positive"], sides[1]: scores["negative"]}
        ranking, ranked = scores["attribution"], {"attribution": scores["attribution"]}
        if window.selected_steps:
            kinds = ("selection", "activation", "frequency")[: 3 if tracker.on_policy else 1]
            shown = {kind: window.selection[kind] for kind in kinds} | shown
            ranking, ranked = window.selection_sizes(), {"selection": window.selection["selection"], **ranked}
        for label, feature in tracker.watch.items():
            logged |= _scores(prefix, label, shown, feature)
        for rank, feature in enumerate(_largest(ranking, log_top), start=1):
            logged[f"{prefix}/top{rank}/feature"] = int(feature)
            logged |= _scores(prefix, f"top{rank}", ranked, feature)
    if tracker.health is not None:
        logged |= {f"{prefix}/{name}": getattr(tracker.health, name) for name in ("fvu", "token_fvu", "l0")}
    if tracker.totals.attribution.nonfinite_steps:
        logged[f"{prefix}/nonfinite_steps"] = tracker.totals.attribution.nonfinite_steps
    return logged


def _scores(prefix: str, label: str, scores: Mapping[str, np.ndarray], feature: int) -> dict[str, float]:
    return {feature_metric(prefix, label, name): float(values[feature]) for name, values in scores.items()}


def of_drift(tracker: FeatureTracker, prefix: str, drift: dict[str, float]) -> dict[str, float]:
    """`{prefix}/{label}/drift`: change of the mean activation on the probe since training began."""
    name = tracker.dictionary.name
    return {
        feature_metric(prefix, label, "drift"): drift[f"{name}/{label}"]
        for label in tracker.watch
        if f"{name}/{label}" in drift
    }


def of_generations(tracker: FeatureTracker, prefix: str, look: Look | None) -> dict[str, float]:
    """`{prefix}/{label}/generation_drift`, of watched features that are active in the sampled answers, and for all dictionaries
    `sae/generations/effective_sample_size`; empty without a new look."""
    if look is None:
        return {}
    drift = look.drifts[tracker.dictionary.name]
    places = {int(feature): place for place, feature in enumerate(drift.features)}
    return {"sae/generations/effective_sample_size": look.effective} | {
        feature_metric(prefix, label, "generation_drift"): float(drift.change[places[feature]])
        for label, feature in tracker.watch.items()
        if feature in places
    }


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    size = np.abs(values)
    n = min(n, len(size))
    top = np.argpartition(size, -n)[-n:] if n else np.array([], dtype=np.int64)
    return top[np.argsort(-size[top], kind="stable")]
