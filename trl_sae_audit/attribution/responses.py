"""From a forward's response tokens and their gradient to the selection of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.attention_sinks import silent_tokens
from ..models.language_head import LanguageHead
from ..saes.dictionary import FeatureDictionary
from .selection import (
    RESIDUAL_TOLERANCE,
    RowSelections,
    TokenDraw,
    draw_tokens,
    encode_rows,
    least_squares_weights,
)


class Responses:
    """The values that a trainer's loss is computed from: one for each token of a forward's responses, or one for each response.

    The numbers' own gradient, as the backward pass comes by, is −c.

    Args:
        values: log π(y_t) of the last n positions of every row, [rows, n], or a reward for every row, [rows] or [rows, 1].
        counted: which of those positions are the response's, bool [rows, n]. Elsewhere the gradient says nothing.
        others: what else of the forward the loss may depend on, such as the entropy.

    Attributes:
        weights: c, [rows, n]; None until the backward pass has come by.
        mixed: whether the loss depends on `others` too; None if they got no gradient.
    """

    def __init__(self, values: Tensor, counted: Tensor, others: tuple[Tensor, ...] = ()) -> None:
        self.counted = counted
        self.weights: Tensor | None = None
        self.mixed: Tensor | None = None
        values.register_hook(self._on_gradient)
        for other in others:
            other.register_hook(self._on_other)

    def _on_gradient(self, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        g = gradient.to(torch.float32)
        if gradient.numel() == len(gradient):
            g = g.reshape(-1, 1) / self.counted.sum(1, keepdim=True).clamp_min(1)
        self.weights = torch.where(self.counted, -g, 0.0)

    def _on_other(self, gradient: Tensor | None) -> None:
        if gradient is None:  # compiled backward passes give every output of a graph one, or None
            return
        found = (gradient != 0).any()
        self.mixed = found if self.mixed is None else self.mixed | found


@dataclass
class DrawnTokens:
    """Response tokens of one forward, drawn in the backward pass and encoded after it.

    Attributes:
        draw: the tokens.
        hidden: at the hook point, [n, d_model].
        owners: which row each is of, or which packed example, [n].
        rows: of the forward, or examples packed in it.
        tokens: all that could have been drawn, [].
        weights: c of the drawn tokens, [n].
        row_weights: Σ_t c_{i,t}, [rows].
        counted: which tokens of the forward could have been drawn, [rows, tokens].
        silent: at which of them no feature counts as active, [rows, tokens].
    """

    draw: TokenDraw
    hidden: Tensor
    owners: Tensor
    rows: int
    tokens: Tensor
    weights: Tensor
    row_weights: Tensor
    counted: Tensor
    silent: Tensor

    def encode(self, dictionary: FeatureDictionary, *, peaks: bool = False) -> RowSelections:
        """Selection of the forward's rows; with `peaks` also the strongest tokens."""
        return encode_rows(
            dictionary,
            self.hidden,
            self.weights,
            self.row_weights,
            self.owners,
            self.draw,
            self.tokens,
            self.silent.flatten()[self.draw.index],
            peaks=peaks,
        )


@dataclass(frozen=True)
class LastHidden:
    """What the gradient at the decoder's last hidden state says of drawn tokens.

    Attributes:
        states, gradient: where each token is predicted, [n, width].
        targets: the tokens' ids, [n].
    """

    states: Tensor
    gradient: Tensor
    targets: Tensor

    def weigh(self, drawn: DrawnTokens, head: LanguageHead) -> Tensor:
        """Find c of the drawn tokens, NaN if the loss is not a function of their log-probabilities; return the residual, []."""
        meant = drawn.draw.scale > 0
        gradient = torch.where(meant[:, None], self.gradient, 0.0)
        _, slopes = head.slopes(self.states, self.targets)
        solution = least_squares_weights(gradient, slopes, drawn.owners)
        known = ~(solution.residual > RESIDUAL_TOLERANCE)
        drawn.weights = torch.where(known, solution.values, torch.nan)
        of_row = drawn.owners == torch.arange(drawn.rows, device=drawn.owners.device)[:, None]
        drawn.row_weights = of_row.to(drawn.weights) @ torch.where(
            meant, drawn.weights * drawn.draw.scale, 0.0
        )
        return solution.residual


def draw_known(
    responses: Responses,
    hidden: Tensor,
    lengths: Tensor | None,
    budget: int,
    generator: torch.Generator,
    *,
    attention_sinks: bool = False,
) -> DrawnTokens | None:
    """Draw tokens whose c the forward shows; None if the tokens are not those of the hidden states [rows, tokens, d_model]."""
    missing = hidden.shape[1] - responses.counted.shape[1]
    if responses.weights is None or missing < 0 or len(responses.counted) != len(hidden):
        return None
    weights, counted = (F.pad(part, (missing, 0)) for part in (responses.weights, responses.counted))
    draw = draw_tokens(weights, counted, budget, generator)
    owners, rows = _owners(hidden, lengths)
    sums = weights.sum(1)
    if lengths is not None:
        sums = (owners == torch.arange(rows, device=owners.device)[:, None]).to(weights) @ weights[0]
    return DrawnTokens(
        draw,
        hidden.flatten(0, 1)[draw.index],
        owners[draw.index],
        rows,
        counted.sum(),
        weights.flatten()[draw.index],
        sums,
        counted,
        silent_tokens(hidden, counted, attention_sinks=attention_sinks),
    )


def draw_unknown(
    last: tuple[Tensor, Tensor],
    ids: Tensor,
    hidden: Tensor,
    lengths: Tensor | None,
    budget: int,
    generator: torch.Generator,
    *,
    attention_sinks: bool = False,
) -> tuple[DrawnTokens, LastHidden] | None:
    """Draw tokens whose c is yet to be found, among those whose prediction has a gradient at the last hidden state.

    Args:
        last: that hidden state and the gradient there, [rows, tokens, width].
        ids: of the tokens, [rows, tokens].
        hidden: at the hook point, [rows, tokens, d_model].
        lengths: of examples packed into one row.
        budget, generator: as for `draw_tokens`.
        attention_sinks: count features as active at attention sinks too.
    """
    states, gradient = last
    if not states.shape[:2] == hidden.shape[:2] == ids.shape:
        return None
    counted = F.pad((gradient != 0).any(-1)[:, :-1], (1, 0))
    draw = draw_tokens(torch.zeros_like(counted, dtype=torch.float32), counted, budget, generator)
    owners, rows = _owners(hidden, lengths)
    unknown = torch.full_like(draw.scale, torch.nan)
    drawn = DrawnTokens(
        draw,
        hidden.flatten(0, 1)[draw.index],
        owners[draw.index],
        rows,
        counted.sum(),
        unknown,
        unknown.new_full((rows,), torch.nan),
        counted,
        silent_tokens(hidden, counted, attention_sinks=attention_sinks),
    )
    predicted = (draw.index - 1).clamp_min(0)
    return drawn, LastHidden(
        states.flatten(0, 1)[predicted], gradient.flatten(0, 1)[predicted], ids.flatten()[draw.index]
    )


def _owners(hidden: Tensor, lengths: Tensor | None) -> tuple[Tensor, int]:
    """Which row, or packed example, each token of the flattened [rows × tokens] is of, and how many there are."""
    rows, tokens = hidden.shape[:2]
    if lengths is None:
        return torch.arange(rows, device=hidden.device).repeat_interleave(tokens), rows
    numbers = torch.arange(len(lengths), device=hidden.device)
    return numbers.repeat_interleave(lengths.to(hidden.device), output_size=rows * tokens), len(lengths)
