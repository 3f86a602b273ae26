"""From the gradients of optimizer steps to their scores, by one sum over the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..saes.dictionary import FeatureDictionary, accumulator
from .microbatch import RowGradients
from .scores import TokenScores, variance_of_sum
from .selection import SelectionScores, SelectionSums, selection_scores


@dataclass
class StepScores:
    """Scores of S consecutive optimizer steps in one dictionary, over all processes.

    Everything per feature is [S, d_sae] on the dictionary's device; `gradient` is G [S, d_model].
    """

    gradient: Tensor
    attribution: Tensor
    positive: Tensor
    negative: Tensor
    variance: Tensor
    counts: Tensor
    token_share: Tensor | None = None
    activation_attribution: Tensor | None = None
    selection: SelectionScores | None = None


@dataclass(frozen=True)
class PackedSteps:
    """Optimizer steps on their way from this process's gradients to the scores of all processes.

    Attributes:
        sums: to be summed over the processes, one row a step, [S, width].
        steps: the gradients they were computed from, which stay on this process.
    """

    sums: Tensor
    steps: Sequence[RowGradients]


def pack(
    steps: Sequence[RowGradients],
    dictionary: FeatureDictionary,
    *,
    token_scores: bool = False,
    selection: bool = False,
) -> PackedSteps:
    """Project S steps once, the only place where features and gradients meet: what is to be summed over the processes.

    One row a step, [S, width], of the same width on every process, whatever rows it had: G, the counts, and for every
    feature the sum s = Σc_i of this process's n contributions, those of each side, and Σ(c_i − s/n)² + s²/n. With the
    totals S and N of all processes the squared deviations are then Σ(…) − S²/N (Chan, Golub and LeVeque 1979), so that one
    sum over the processes is enough; in float64, which can bear the difference.
    """
    wide = accumulator(dictionary.device)
    sums = torch.stack([step.sums for step in steps]).to(dictionary.device, torch.float32)
    counts = torch.stack([step.counts for step in steps]).to(sums)
    centred = [_centre(step.examples.to(sums)) for step in steps]
    projected, within = _project(-sums.flatten(0, 1), centred, dictionary)
    contributions, *sides = projected.to(wide).reshape(len(steps), 3, -1).unbind(1)
    parts = [sums[:, 0], counts, contributions, *sides, within + _squared_over(contributions, counts)]
    if token_scores:
        tokens = [step.tokens or TokenScores.zero(dictionary) for step in steps]
        parts += [
            torch.stack([scores.projected_squares for scores in tokens]),
            torch.stack([scores.activation_attribution for scores in tokens]),
            torch.stack([scores.gradient_squares for scores in tokens])[:, None],
        ]
    if selection:
        parts.append(SelectionSums.stack([step.selection for step in steps if step.selection is not None]))
    return PackedSteps(torch.cat([part.to(wide) for part in parts], dim=1), steps)


def unpack(
    sums: Tensor,
    dictionary: FeatureDictionary,
    *,
    token_scores: bool = False,
    selection: bool = False,
    compared: bool = True,
) -> StepScores:
    """Scores of the S steps whose packed `sums` have been summed over the processes; `compared` as for `selection_scores`."""
    features = [dictionary.d_sae] * 4
    widths = [dictionary.d_model, 3, *features, *([*features[:2], 1] if token_scores else [])]
    if selection:
        widths.append(SelectionSums.width(dictionary.d_sae))
    gradient, counts, contributions, positive, negative, moments, *more = sums.split(widths, dim=1)
    tokens = more[:3] if token_scores else []
    deviations = (moments - _squared_over(contributions, counts)).clamp_min(0)
    scores = StepScores(
        gradient=gradient.float(),
        attribution=contributions.float(),
        positive=positive.float(),
        negative=negative.float(),
        variance=variance_of_sum(deviations.float(), counts[:, 0]),
        counts=counts.float(),
    )
    if tokens:
        squared, activation_attribution, norm = (part.float() for part in tokens)
        scores.token_share = torch.where(norm > 0, squared / norm, 0.0)
        scores.activation_attribution = activation_attribution
    if selection:
        scores.selection = selection_scores(
            SelectionSums.unstack(more[-1], dictionary.d_sae), compared=compared
        )
    return scores


def _project(vectors: Tensor, groups: list[Tensor], dictionary: FeatureDictionary) -> tuple[Tensor, Tensor]:
    """⟨v, d_f⟩ [n, d_sae] of `vectors` [n, d_model], and Σ_i ⟨v_i, d_f⟩² [groups, d_sae] within each group.

    In one reading of the dictionary, and without an [n, d_sae] matrix of the groups.
    """
    products = torch.empty(len(vectors), dictionary.d_sae, dtype=torch.float32, device=dictionary.device)
    squares = torch.empty(len(groups), dictionary.d_sae, dtype=torch.float32, device=dictionary.device)
    for chunk in dictionary.chunks(max(map(len, [vectors, *groups]))):
        products[:, chunk.features] = chunk.project(vectors)
        for index, group in enumerate(groups):
            squares[index, chunk.features] = chunk.project(group).square_().sum(0)
    return products, squares


def _centre(examples: Tensor) -> Tensor:
    """Each example's G less their mean: [n, d_model]."""
    return examples - examples.mean(0) if len(examples) else examples


def _squared_over(contributions: Tensor, counts: Tensor) -> Tensor:
    """s²/n of every step and feature, 0 where nothing contributed: [S, d_sae], counts [S, 3]."""
    return contributions.square() / counts[:, :1].clamp_min(1).to(contributions)
