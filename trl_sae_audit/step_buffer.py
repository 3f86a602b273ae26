"""Gradient sums of the optimizer steps since the last projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dictionary import FeatureDictionary
from .errors import AuditError
from .scores import TokenScores, accumulator, variance_of_sum


@dataclass
class StepSums:
    """One optimizer step at one hook point, on this process.

    `sums` holds G of the whole step, of the positive side and of the negative side: [3, d_model].
    `counts` the examples in each: [3]. `examples` every example's own G: [n, d_model], and `example_sides`
    its side (+1, -1, 0), or None where an example has both.
    """

    sums: Tensor
    counts: Tensor
    examples: Tensor
    example_sides: Tensor | None
    tokens: TokenScores | None


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


class StepBuffer:
    """Collects micro-batches into optimizer steps; keeps sums only, until `take` hands them over."""

    def __init__(self) -> None:
        self._microbatches: list[StepSums] = []
        self._tokens: list[TokenScores] = []
        self._steps: list[StepSums] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient has arrived since the last optimizer step."""
        return bool(self._microbatches)

    def add(self, rows: Tensor, sides: Tensor | None, *, paired: bool) -> None:
        """Examples of a micro-batch.

        Args:
            rows: Σ_t g[i,t] of every row, [rows, d_model], float32.
            sides: +1, -1 or 0 of every row, [rows]; None where the trainer has no sides.
            paired: row j and row j + rows/2 are one example.

        Raises:
            AuditError: if pairs are expected and the number of rows is odd.
        """
        if paired and len(rows) % 2:
            raise AuditError(
                f"The model saw {len(rows)} rows where pairs of chosen and rejected were expected; a custom collator, "
                "packing or padding_free changes the layout."
            )
        examples, example_sides = rows, sides
        if paired:
            examples, example_sides = rows[: len(rows) // 2] + rows[len(rows) // 2 :], None
        masks = torch.ones(3, len(rows), device=rows.device)
        if sides is None:
            masks[1:] = 0
        else:
            masks[1], masks[2] = sides > 0, sides < 0
        counts = masks.sum(1)
        counts[0] = len(examples)
        self._microbatches.append(StepSums(masks @ rows, counts, examples, example_sides, None))

    def add_tokens(self, tokens: TokenScores) -> None:
        """Token-level scores of a micro-batch."""
        self._tokens.append(tokens)

    def finish_step(self, divisor: float) -> None:
        """The optimizer is about to step: what has arrived, divided by `divisor`, is one step's gradient."""
        parts, self._microbatches = self._microbatches, []
        tokens, self._tokens = self._tokens, []
        sides = [part.example_sides for part in parts if part.example_sides is not None]
        self._steps.append(
            StepSums(
                torch.stack([part.sums for part in parts]).sum(0) / divisor,
                torch.stack([part.counts for part in parts]).sum(0),
                torch.cat([part.examples for part in parts]) / divisor,
                torch.cat(sides) if sides else None,
                _add_tokens(tokens, divisor) if tokens else None,
            )
        )

    def discard(self) -> None:
        """Forget a step that was not finished."""
        self._microbatches, self._tokens = [], []

    def take(self) -> list[StepSums]:
        """Hand over the finished steps."""
        steps, self._steps = self._steps, []
        return steps


def pack(steps: list[StepSums], dictionary: FeatureDictionary, *, token_scores: bool) -> Tensor:
    """Project S steps once, the only place where features and gradients meet: what is to be summed over the processes.

    One row a step, [S, width], of the same width on every process, whatever rows it had: G, the counts, and for every
    feature the sum s = Σc_i of this process's n contributions, those of each side, and Σ(c_i − s/n)² + s²/n. With the
    totals S and N of all processes the squared deviations are then Σ(…) − S²/N (Chan, Golub and LeVeque 1979), so that one
    sum over the processes is enough; in float64, which can bear the difference.
    """
    wide = accumulator(dictionary.device)
    sums = torch.stack([step.sums for step in steps]).to(dictionary.device, torch.float32)
    counts = torch.stack([step.counts for step in steps]).to(sums)
    centred = [_centred(step.examples.to(sums)) for step in steps]
    projected, within = _project(-sums.flatten(0, 1), centred, dictionary)
    contributions, *sides = projected.to(wide).reshape(len(steps), 3, -1).unbind(1)
    parts = [sums[:, 0], counts, contributions, *sides, within + _squared_over(contributions, counts)]
    if token_scores:
        tokens = [step.tokens or TokenScores.zero(dictionary) for step in steps]
        parts += [
            torch.stack([one.projected_squares for one in tokens]),
            torch.stack([one.activation_attribution for one in tokens]),
            torch.stack([one.gradient_squares for one in tokens])[:, None],
        ]
    return torch.cat([part.to(wide) for part in parts], dim=1)


def unpack(packed: Tensor, dictionary: FeatureDictionary, *, token_scores: bool) -> StepScores:
    """Scores of the S steps whose packed parts have been summed over the processes."""
    features = [dictionary.d_sae] * 4
    widths = [dictionary.d_model, 3, *features, *([*features[:2], 1] if token_scores else [])]
    gradient, counts, contributions, positive, negative, moments, *tokens = packed.split(widths, dim=1)
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
    return scores


def _project(vectors: Tensor, groups: list[Tensor], dictionary: FeatureDictionary) -> tuple[Tensor, Tensor]:
    """⟨v, d_f⟩ [n, d_sae] of `vectors` [n, d_model], and Σ_i ⟨v_i, d_f⟩² [groups, d_sae] within each group.

    In one reading of the dictionary, and without an [n, d_sae] matrix of the groups.
    """
    products = torch.empty(len(vectors), dictionary.d_sae, device=dictionary.device)
    squares = torch.empty(len(groups), dictionary.d_sae, device=dictionary.device)
    for block in dictionary.blocks(max(map(len, [vectors, *groups]))):
        products[:, block.features] = block.project(vectors)
        for index, group in enumerate(groups):
            squares[index, block.features] = block.project(group).square_().sum(0)
    return products, squares


def _centred(examples: Tensor) -> Tensor:
    """Each example's G less their mean: [n, d_model]."""
    return examples - examples.mean(0) if len(examples) else examples


def _squared_over(contributions: Tensor, counts: Tensor) -> Tensor:
    """s²/n of every step and feature, 0 where nothing contributed: [S, d_sae], counts [S, 3]."""
    return contributions.square() / counts[:, :1].clamp_min(1).to(contributions)


def _add_tokens(parts: list[TokenScores], divisor: float) -> TokenScores:
    return TokenScores(
        torch.stack([part.projected_squares for part in parts]).sum(0) / divisor**2,
        torch.stack([part.gradient_squares for part in parts]).sum() / divisor**2,
        torch.stack([part.activation_attribution for part in parts]).sum(0) / divisor,
    )
