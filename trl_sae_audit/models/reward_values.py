"""What a reward returned: one finite number for each response, or None."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import AuditError


def check_rewards(values: Any, n: int, name: str) -> list[float | None]:
    """The rewards of `n` responses as numbers; None stays None.

    Raises:
        AuditError: another count, a reward that is no single number, or one that is NaN or infinite.
    """
    if isinstance(values, (Tensor, np.ndarray)):
        if values.ndim == 2 and values.shape[-1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise AuditError(
                f"Reward {name!r} returned an array of shape {tuple(values.shape)}; return one number a response."
            )
    if not isinstance(values, (Sequence, Tensor, np.ndarray)) or isinstance(values, str):
        raise AuditError(
            f"Reward {name!r} returned a {type(values).__name__}; return a list of one number a response."
        )
    if len(values) != n:
        raise AuditError(
            f"Reward {name!r} returned {len(values)} rewards for {n} responses; return one each."
        )
    return [_check_reward(value, index, name) for index, value in enumerate(values)]


def _check_reward(value: Any, index: int, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) != 1:
        raise AuditError(
            f"Reward {index} of {name!r} has shape {tuple(value.shape)}; return one number a response, combined from its "
            "parts."
        )
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise AuditError(
            f"Reward {index} of {name!r} is a {type(value).__name__}; return one number a response."
        ) from error
    if not math.isfinite(number):
        raise AuditError(
            f"Reward {index} of {name!r} is {number}; return None for a response that is not to be judged, and a finite "
            "number otherwise."
        )
    return number
