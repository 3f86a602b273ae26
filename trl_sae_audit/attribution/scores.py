"""The scores of an optimizer step: tensors in, tensors out.

Sign, everywhere: positive means that a step down this gradient up-weights the feature.
`G` is the gradient of the step's loss summed over the tokens of an example, a side or the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..saes.dictionary import FeatureDictionary


def cosine(attribution: Tensor, gradient: Tensor) -> Tensor:
    """Cosine of the descent direction -G with each feature: attribution / ‖G‖; 0 where G is 0.

    Args:
        attribution: [n, d_sae]
        gradient: [n, d_model]
    """
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).to(attribution)
    return torch.where(norm > 0, attribution / norm, 0.0)


def share(cosine: Tensor) -> Tensor:
    """Part of ‖G‖² along the feature, cosine². Directions overlap, so shares do not add up to 1."""
    return cosine.square()


def variance_of_sum(squared_deviations: Tensor, count: Tensor) -> Tensor:
    """Squared standard error of a sum of `count` independent contributions: n/(n-1)·Σ(c − c̄)².

    Args:
        squared_deviations: Σ(c − c̄)² [n, d_sae]; centred before squaring, for Σc² − (Σc)²/n cancels.
        count: number of contributions [n]

    Returns:
        [n, d_sae]; NaN where there are fewer than two contributions.
    """
    n = count.to(squared_deviations)[:, None]
    return torch.where(n > 1, squared_deviations * n / (n - 1), torch.nan)


def coverage(gradient: Tensor, directions: Tensor) -> Tensor:
    """Part of ‖G‖² inside the span of some directions; k random ones would hold k / d_model of it.

    The directions are usually those with the largest attribution, chosen among many, which random ones
    drawn beforehand are not: read the comparison as an upper bound of what the dictionary adds.

    Args:
        gradient: [n, d_model]
        directions: [n, k, d_model]

    Returns:
        [n], 0 where the gradient is 0.
    """
    _, singular, basis = torch.linalg.svd(directions, full_matrices=False)
    spanning = singular > singular[:, :1] * 1e-5
    inside = (torch.einsum("nkd,nd->nk", basis, gradient).square() * spanning).sum(1)
    norm = gradient.square().sum(1)
    return torch.where(norm > 0, inside / norm, 0.0)


@dataclass
class TokenScores:
    """Running token-level scores of one optimizer step, over loss positions only.

    `token_share_f = Σ⟨g,d_f⟩² / Σ‖g‖²`; `activation_attribution_f = -Σ a_f·⟨g, ∂h/∂a_f⟩`, the first-order
    effect on the loss of the feature's activation (a_f times the decoder row as the SAE writes it).
    """

    projected_squares: Tensor
    gradient_squares: Tensor
    activation_attribution: Tensor

    @classmethod
    def zero(cls, dictionary: FeatureDictionary) -> TokenScores:
        return cls(
            torch.zeros_like(dictionary.norms),
            torch.zeros((), dtype=torch.float32, device=dictionary.device),
            torch.zeros_like(dictionary.norms),
        )

    @classmethod
    def join(cls, parts: Sequence[TokenScores], divisor: float) -> TokenScores:
        """Those of all parts, their gradients divided by `divisor`."""
        return cls(
            torch.stack([part.projected_squares for part in parts]).sum(0) / divisor**2,
            torch.stack([part.gradient_squares for part in parts]).sum() / divisor**2,
            torch.stack([part.activation_attribution for part in parts]).sum(0) / divisor,
        )

    def add(
        self,
        gradient: Tensor,
        hidden: Tensor,
        dictionary: FeatureDictionary,
        scale: Tensor | None = None,
        silent: Tensor | None = None,
    ) -> None:
        """Add tokens, some at a time; not to `gradient_squares`, which needs no dictionary.

        Args:
            gradient, hidden: of the tokens [n, d_model].
            dictionary: projects the one and encodes the other.
            scale: how many tokens each stands for [n]; by default one.
            silent: at which no feature counts as active [n]; by default none.
        """
        scale = (
            torch.ones(len(gradient), dtype=torch.float32, device=gradient.device) if scale is None else scale
        )
        silent = torch.zeros_like(scale, dtype=torch.bool) if silent is None else silent
        values = (gradient.float(), hidden.float(), scale.float(), silent)
        for g, h, times, none in zip(
            *(each.split(dictionary.tokens_at_once) for each in values), strict=True
        ):
            projected = dictionary.project(g)
            self.projected_squares += times @ projected.square()
            activations = dictionary.encode(h, none)
            effect = projected.mul_(activations).mul_(dictionary.written_norms(h))
            self.activation_attribution -= times @ effect
