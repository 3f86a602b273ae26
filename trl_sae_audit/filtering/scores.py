"""How much each audited example does what the flags object to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from ..errors import AuditError
from ..flags import Flag
from ..statistics import explain_preferences

if TYPE_CHECKING:
    from ..audit.result import Audit

ScoreName = Literal["max_activation", "activation", "attribution", "activation_attribution", "influence"]
Weighting = Literal["fit", "flags"]
SCORES, WEIGHTS = get_args(ScoreName), get_args(Weighting)


def example_scores(
    audit: Audit,
    flags: Sequence[Flag],
    score: ScoreName | Mapping[str, float],
    weights: Weighting,
) -> np.ndarray:
    """How much each audited example does what the flags object to [n].

    Args:
        audit: of the examples.
        flags: of the audit's dictionary.
        score: one of SCORES, or a mix as {name: weight}.
        weights: how flags are added up. "flags": each in units of its root mean square, by its own weight. "fit": by the
            coefficients that explain best which answer was preferred, see `explain_preferences`; the score is then the
            log-odds of the choice as far as the flagged features explain it, and flags that are no help count nothing.
    """
    mix = {score: 1.0} if isinstance(score, str) else dict(score)
    if not mix:
        raise AuditError(f"score is an empty mix; name at least one of {', '.join(SCORES)}.")
    for name, share in mix.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not math.isfinite(share):
            raise AuditError(f"score gives {name!r} the weight {share!r}; give a number.")
    if weights not in WEIGHTS:
        raise AuditError(f"weights is {weights!r}; choose one of {', '.join(WEIGHTS)}.")
    total = np.zeros(len(audit))
    for name, share in mix.items():
        values = _directed_values(audit, name, flags)
        if weights == "fit":
            factors = explain_preferences(torch.from_numpy(values)).numpy()
        else:
            size = np.sqrt((values**2).mean(0))
            factors = np.divide(
                [flag.weight for flag in flags], size, out=np.zeros_like(size), where=size > 0
            )
        total += share * (values @ factors)
    return total


def _directed_values(audit: Audit, name: str, flags: Sequence[Flag]) -> np.ndarray:
    """Of each example and flag [n, k], positive = what the flag objects to: of one in both directions what the data do on average."""
    readers: dict[str, Callable[[Sequence[int]], np.ndarray]] = {
        "attribution": audit.contributions,
        "activation_attribution": audit.activation_contributions,
        "influence": audit.influence_of,
        "activation": audit.activation_gaps,
        "max_activation": lambda features: audit.activation_gaps(features, "max"),
    }
    if name not in SCORES:
        raise AuditError(
            f"score is {name!r}; choose among {', '.join(SCORES)}, or give a mix as {{name: weight}}."
        )
    values = readers[name]([flag.feature for flag in flags]).astype(np.float64)
    signs = [
        (np.sign(values[:, column].mean()) or 1.0) if flag.direction == "both" else flag.signed(np.ones(1))[0]
        for column, flag in enumerate(flags)
    ]
    return values * signs
