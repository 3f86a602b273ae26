"""What the trainer's own log shows: names and numbers under the prefix `sae/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .channel import Channel


def of_channel(
    channel: Channel, prefix: str, sides: tuple[str, str] | None, log_top: int
) -> dict[str, float]:
    """Means over the optimizer steps since the last log; empty if there was none.

    `{prefix}/{label}/attribution`, `/share` and one entry for each side; `{prefix}/top{n}/feature` and
    `/attribution` for the features with the largest mean attribution; `{prefix}/grad_norm`, ‖G‖;
    `{prefix}/coverage`, the part of ‖G‖² the step's top features span; `{prefix}/fvu`,
    `/token_fvu` and `/l0`, see Health.
    """
    window = channel.take_window()
    logged: dict[str, float] = {}
    if window is not None:
        logged[f"{prefix}/grad_norm"] = window.norm
        logged[f"{prefix}/coverage"] = window.coverage
        for label, feature in channel.watch.items():
            logged[f"{prefix}/{label}/attribution"] = float(window.attribution[feature])
            logged[f"{prefix}/{label}/share"] = float(window.share[feature])
            if sides is not None:
                logged[f"{prefix}/{label}/{sides[0]}"] = float(window.positive[feature])
                logged[f"{prefix}/{label}/{sides[1]}"] = float(window.negative[feature])
        for rank, feature in enumerate(_largest(window.attribution, log_top), start=1):
            logged[f"{prefix}/top{rank}/feature"] = int(feature)
            logged[f"{prefix}/top{rank}/attribution"] = float(window.attribution[feature])
    if channel.health is not None:
        logged[f"{prefix}/fvu"] = channel.health.fvu
        logged[f"{prefix}/token_fvu"] = channel.health.token_fvu
        logged[f"{prefix}/l0"] = channel.health.l0
    if channel.totals.nonfinite_steps:
        logged[f"{prefix}/nonfinite_steps"] = channel.totals.nonfinite_steps
    return logged


def of_drift(channel: Channel, prefix: str, drift: dict[str, float]) -> dict[str, float]:
    """`{prefix}/{label}/drift`: change of the mean activation on the probe since training began."""
    name = channel.dictionary.name
    return {
        f"{prefix}/{label}/drift": drift[f"{name}/{label}"]
        for label in channel.watch
        if f"{name}/{label}" in drift
    }


def _largest(attribution: np.ndarray, n: int) -> np.ndarray:
    size = np.abs(attribution)
    n = min(n, len(size))
    top = np.argpartition(size, -n)[-n:] if n else np.array([], dtype=np.int64)
    return top[np.argsort(-size[top], kind="stable")]
