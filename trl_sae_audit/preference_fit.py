"""How much of a preference set some scores explain: logistic regression of the choice on the scores' gaps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

_PRIOR = 3.0


def explain_preferences(gaps: Tensor) -> Tensor:
    """The coefficients with which score gaps explain which answer was preferred, by penalised maximum likelihood.

        λ = argmax_{λ ≥ 0} Σ_i log σ(Σ_f λ_f·δ_if) − ½ Σ_f (λ_f·sd(δ_f) / 3)²

    The first term is concave, a Bradley–Terry model with covariates; the second, a prior of 3 log-odds for a standard
    deviation, is felt only where a gap decides nearly every pair, and keeps λ finite there.

    Args:
        gaps: δ, score of the chosen answer less that of the rejected one [n, k], float64.

    Returns:
        λ [k], float64: log-odds for each unit of score; 0 for a gap that the preferences are against, or that others
        stand in for.
    """
    spread = gaps.std(0, unbiased=False)
    spread = torch.where(spread > 0, spread, 1.0)
    units = gaps / spread

    def objective(values: Any) -> tuple[float, Any]:
        weights = torch.tensor(values, dtype=torch.float64)
        margin = units @ weights
        loss = -F.logsigmoid(margin).sum() + 0.5 * (weights / _PRIOR).square().sum()
        slope = -(units * torch.sigmoid(-margin)[:, None]).sum(0) + weights / _PRIOR**2
        return float(loss), slope.numpy()

    k = gaps.shape[1]
    found = minimize(objective, [0.0] * k, jac=True, method="L-BFGS-B", bounds=[(0, None)] * k)
    return torch.tensor(found.x, dtype=torch.float64) / spread
