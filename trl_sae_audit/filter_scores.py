"""How much each audited example does what the flags object to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import AuditError
from .flags import Flag

if TYPE_CHECKING:
    from .audit_result import Audit

SCORES = ("attribution", "influence", "activation")


def example_scores(audit: Audit, flags: Sequence[Flag], score: str | Mapping[str, float]) -> np.ndarray:
    """How much each audited example does what the flags object to [n]."""
    mix = {score: 1.0} if isinstance(score, str) else dict(score)
    if not mix:
        raise AuditError(f"score is an empty mix; name at least one of {', '.join(SCORES)}.")
    features = [flag.feature for flag in flags]
    total = np.zeros(len(audit))
    for name, share in mix.items():
        if name not in SCORES:
            raise AuditError(
                f"score is {name!r}; choose among {', '.join(SCORES)}, or give a mix as {{name: weight}}."
            )
        values = _values(audit, name, features).astype(np.float64)
        size = np.sqrt((values**2).mean(0))
        values = np.divide(values, size, out=np.zeros_like(values), where=size > 0)
        for column, flag in enumerate(flags):
            total += share * flag.weight * flag.signed(values[:, column])
    return total


def _values(audit: Audit, name: str, features: Sequence[int]) -> np.ndarray:
    readers: dict[str, Callable[[Sequence[int]], np.ndarray]] = {
        "attribution": audit.contributions,
        "activation": audit.activation_gaps,
        "influence": audit.influence_of,
    }
    return readers[name](features)
