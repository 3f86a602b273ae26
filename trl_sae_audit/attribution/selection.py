"""Selection: which features an optimizer step selects for, by the response tokens it makes more and less likely.

    selection_f = Σ_{i,t} c_{i,t}·(a_f[i,t] − ā_f),    c_{i,t} = −∂L/∂log π(y_{i,t})

`a_f[i,t]` is the feature's activation at response token t of row i itself (the logits that predict it are one position to its
left), the end of sequence included; `ā_f` its mean over all response tokens of the step. It is the Price equation's selection
differential of the population of tokens: by how much the feature's mean activation per token changes if every token becomes
more frequent in proportion to its c. In DPO, KTO and RLOO the tokens of a response share their c_i, and this is
`Σ_i c_i·T_i·(ā_f(y_i) − ā_f)`, without the ā_f just a length-weighted `Σ_i c_i·ā_f(y_i)`. Positive where the step selects for
the feature, like every score here.

A reward model has no log π: with `c_{i,t} = −(1/T_i)·∂L/∂r_i` it is what the labels select. Plain fine-tuning lowers no token
and so compares with nothing: without ā_f, it is what the data add.

At an attention sink no feature counts as active, unless asked for: `a_f` is 0 there, as it is where a run's drift in generations
and a measured change are told. The token keeps its c, and counts among the tokens.

Only some tokens are encoded, `budget` a step. They are drawn such that every sum stays unbiased (`draw_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..saes.dictionary import FeatureDictionary, accumulator
from ..statistics import selection_against_mean, selection_squares_against_mean
from .scores import variance_of_sum

EVEN = 0.25
"""Share of the draw that goes evenly to all response tokens, whatever their weight.

It gives ā_f, and what the features do in a rollout, from the same tokens; and no drawn token counts for more than 1 / EVEN times
what it would in an even draw."""

RESIDUAL_TOLERANCE = 0.05
"""Above this, a loss is not a function of the response's log-probabilities.

Rounding in bfloat16 leaves some 1e-3; a divergence over the whole vocabulary leaves more than half."""

_RESOLUTION = 2.0**40
_FLAT = 1e-4


@dataclass(frozen=True)
class LogProbWeights:
    """c of some tokens.

    Attributes:
        values: [n].
        residual: the part of the squared gradient that no c explains, from 0 to 1; NaN where there is no gradient.
    """

    values: Tensor
    residual: Tensor


def least_squares_weights(gradient: Tensor, slopes: Tensor, rows: Tensor) -> LogProbWeights:
    """c from the gradient of any loss at the decoder's last hidden state, which is `−c·J` with `J = ∂log π(y_t)/∂h`.

    Each token has one equation in every dimension of h for its one unknown: `c = −⟨g, J⟩/⟨J, J⟩`. What is left over shows
    whether the loss depends on the hidden state by this log-probability alone.

    A token that the model is sure of has a J that is mostly rounding. It takes the c of its row's other tokens.

    Args:
        gradient, slopes: g and J of n tokens, [n, d_model]; see `LanguageHead.slopes`.
        rows: which response each token is of, [n].
    """
    g, j = gradient.to(torch.float32), slopes.to(torch.float32)
    along, length = -(g * j).sum(1), j.square().sum(1)
    same = (rows[:, None] == rows).to(along)
    shared = _ratio(same @ along, same @ length)
    flat = length <= _FLAT**2 * length.max().clamp_min(0)
    values = torch.where(flat, shared, _ratio(along, length))
    total = g.square().sum()
    left = (g + values[:, None] * j).square().sum()
    return LogProbWeights(values, torch.where(total > 0, left / total, torch.nan))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)


@dataclass(frozen=True)
class TokenDraw:
    """Some tokens of a batch, and how many tokens each represents.

    Attributes:
        index: places in the flattened [rows × tokens], as many as the budget, some of them perhaps several times: [n].
        scale: what each is to be multiplied by, so that the expected sum is that over all tokens; 0 where none is meant: [n].
    """

    index: Tensor
    scale: Tensor


def draw_tokens(weights: Tensor, counted: Tensor, budget: int, generator: torch.Generator) -> TokenDraw:
    """Draw response tokens with chances proportional to the size of their weight, systematically over the rows.

    Each row gets its share of the budget up to rounding; within a row tokens come in random order, so that no regularity of
    texts meets one of the draw. A token whose chance is 1 is taken, and counts once; others count by the inverse of their
    chance (Horvitz and Thompson 1952). In DPO late in training, where few pairs have most of the weight, this has a half to a
    tenth of the variance of as many tokens from every row; where weights are equal, the same.

    Nothing waits for the device: shapes follow from those of the arguments. Sums are of integers, for which CUDA has
    deterministic algorithms.

    Args:
        weights: c where it is known, [rows, tokens]; else 0 everywhere, for an even draw.
        counted: which tokens are the response's, [rows, tokens].
        budget: tokens to draw; where there are no more, all are taken.
        generator: on the device of the tensors.
    """
    device, (rows, tokens) = counted.device, counted.shape
    if device.type == "cpu":  # which does not have to be waited for
        every = counted.flatten().nonzero()[:, 0]
        if len(every) <= budget:
            return TokenDraw(every, torch.ones(len(every), dtype=torch.float32))
    if counted.numel() <= budget:
        return TokenDraw(torch.arange(counted.numel(), device=device), counted.flatten().float())
    wide = accumulator(device)
    order = torch.rand(rows, tokens, device=device, dtype=torch.float32, generator=generator).argsort(1)
    widths = (_shares(weights.to(wide), counted).gather(1, order) * _RESOLUTION).to(torch.int64).flatten()
    ends = widths.cumsum(0)
    whole = ends[-1]
    start = (torch.rand((), device=device, dtype=wide, generator=generator) * whole).to(torch.int64)
    marks = (torch.arange(budget, device=device) * whole + start) // budget
    place = torch.searchsorted(ends, marks, right=True).clamp_max(len(ends) - 1)
    times = torch.searchsorted(place, place, right=True) - torch.searchsorted(place, place)
    expected = widths[place].to(wide) * budget / whole
    scale = torch.where(expected >= 1, 1 / times.to(wide), 1 / expected)
    index = (order + torch.arange(rows, device=device)[:, None] * tokens).flatten()[place]
    return TokenDraw(index, torch.where(counted.flatten()[index], scale, 0.0).float())


def _shares(weights: Tensor, counted: Tensor) -> Tensor:
    """Each token's share of the draw, [rows, tokens]; they sum to 1."""
    size = torch.where(counted, weights.abs().nan_to_num(0.0, 0.0, 0.0), 0.0)
    even = counted / counted.sum().clamp_min(1).to(size)
    total = size.sum()
    return torch.where(total > 0, (1 - EVEN) * size / total + EVEN * even, even)


@dataclass
class ResponseSums:
    """What the features do in some responses; parts add up.

    Attributes:
        activation: Σ a_f over all response tokens, [d_sae].
        active: response tokens on which the feature is active, [d_sae].
        tokens: response tokens, [1].
    """

    activation: Tensor
    active: Tensor
    tokens: Tensor

    def __add__(self, other: ResponseSums) -> ResponseSums:
        return ResponseSums(
            self.activation + other.activation, self.active + other.active, self.tokens + other.tokens
        )


@dataclass
class RowSelections:
    """The sums from which the selection of some rows is computed.

    Attributes:
        products: Σ_t c_{i,t}·a_f[i,t] of every row, [rows, d_sae].
        weights: Σ_t c_{i,t} of every row, [rows].
        responses: what the features do in them.
        peaks: the largest activation of each feature, 0 where it has none above, and the place of the token that has it in the
            flattened [rows × tokens], [d_sae] both; None where the tokens were not encoded.
    """

    products: Tensor
    weights: Tensor
    responses: ResponseSums
    peaks: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def encode_rows(
    dictionary: FeatureDictionary,
    hidden: Tensor,
    weights: Tensor,
    row_weights: Tensor,
    owners: Tensor,
    draw: TokenDraw,
    tokens: Tensor,
    silent: Tensor,
    *,
    peaks: bool = False,
) -> RowSelections:
    """Encode the drawn tokens, as many at once as take 64 MiB.

    Args:
        dictionary: on the device of `hidden`.
        hidden: at its hook point, of the drawn tokens, [n, d_model].
        weights: c of the drawn tokens, [n].
        row_weights: Σ_t c_{i,t} of every row, [rows].
        owners: the row of each drawn token, [n].
        draw: the tokens.
        tokens: how many there are in all, [].
        silent: drawn tokens at which no feature counts as active, [n].
        peaks: also find each feature's strongest token.
    """
    meant = draw.scale > 0
    states = torch.where(meant[:, None], hidden, 0.0)
    factors = torch.where(meant, weights * draw.scale, 0.0)
    number = torch.arange(len(row_weights), device=owners.device)[:, None]
    zero = torch.zeros(dictionary.d_sae, dtype=torch.float32, device=owners.device)
    products, activation, active = zero.expand(len(number), -1).clone(), zero, zero.clone()
    peak, peak_place = zero.clone(), torch.zeros_like(zero, dtype=torch.int64)
    parts = [
        part.split(dictionary.tokens_at_once)
        for part in (states, factors, draw.scale, owners, draw.index, silent)
    ]
    for state, factor, scale, owner, place, none in zip(*parts, strict=True):
        activations = dictionary.encode(state, none)
        if peaks:
            here, at = (activations * (scale > 0)[:, None]).max(0)
            peak_place = torch.where(here > peak, place[at], peak_place)
            peak = torch.maximum(peak, here)
        products += torch.where(owner == number, factor, 0.0) @ activations
        activation += scale @ activations
        active += scale @ (activations != 0).to(scale)
    sums = ResponseSums(activation, active, tokens[None].float())
    return RowSelections(products, row_weights, sums, (peak, peak_place) if peaks else None)


@dataclass
class SelectionSums:
    """Selection of an optimizer step, or of a part of one; parts add up.

    Attributes:
        products: Σ c·a_f of all rows, of those on the positive and of those on the negative side, [..., 3, d_sae].
        squares: Σ (Σ_t c·a_f)² over the examples, [..., d_sae].
        crossed: Σ (Σ_t c)·(Σ_t c·a_f) over the examples, [..., d_sae].
        weights: Σ c, of all rows and of each side, [..., 3].
        weight_squares: Σ (Σ_t c)² over the examples, [..., 1].
        examples: how many, [..., 1].
        activation, active, tokens: as in `ResponseSums`, [..., d_sae] and [..., 1].
    """

    products: Tensor
    squares: Tensor
    crossed: Tensor
    weights: Tensor
    weight_squares: Tensor
    examples: Tensor
    activation: Tensor
    active: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, products: Tensor, weights: Tensor, sides: Tensor, *, paired: bool) -> SelectionSums:
        """Of the rows of a micro-batch, without what the features do in the responses.

        Args:
            products, weights: see `RowSelections`.
            sides: which rows are meant in all, and which are on either side, 0 or 1, [3, rows].
            paired: row j and row j + rows/2 are one example, chosen less rejected.
        """
        values, sums = products, weights
        if paired:
            values, sums = (part[: len(part) // 2] + part[len(part) // 2 :] for part in (products, weights))
        none = torch.zeros(products.shape[1], dtype=torch.float32, device=products.device)
        return cls(
            products=sides @ products,
            squares=values.square().sum(0),
            crossed=sums @ values,
            weights=sides @ weights,
            weight_squares=sums.square().sum(0, keepdim=True),
            examples=torch.full((1,), float(len(sums)), dtype=torch.float32, device=sums.device),
            activation=none,
            active=none,
            tokens=none[:1],
        )

    @classmethod
    def zero(cls, features: int, device: torch.device) -> SelectionSums:
        """Of no rows."""
        nothing = torch.zeros(0, features, dtype=torch.float32, device=device)
        return cls.of(nothing, nothing.new_zeros(0), nothing.new_zeros(3, 0), paired=False)

    def with_responses(self, responses: ResponseSums) -> SelectionSums:
        """The same with what the features do in the responses."""
        return replace(self, **vars(responses))

    @classmethod
    def join(cls, parts: Sequence[SelectionSums], divisor: float) -> SelectionSums:
        """Of a step whose loss is the sum of the parts', divided by a number."""
        total = {name: sum(getattr(part, name) for part in parts) for name in vars(parts[0])}
        for name in ("products", "weights"):
            total[name] = total[name] / divisor
        for name in ("squares", "crossed", "weight_squares"):
            total[name] = total[name] / divisor**2
        return cls(**total)

    @classmethod
    def stack(cls, steps: Sequence[SelectionSums]) -> Tensor:
        """S steps as rows, [S, width], in the widest type: what can be summed over the processes."""
        wide = accumulator(steps[0].squares.device)
        rows = [torch.cat([part.flatten() for part in vars(step).values()]) for step in steps]
        return torch.stack(rows).to(wide)

    @classmethod
    def unstack(cls, rows: Tensor, features: int) -> SelectionSums:
        """What `stack` made rows of."""
        shapes = {name: part.shape for name, part in vars(cls.zero(features, torch.device("cpu"))).items()}
        parts = rows.split([shape.numel() for shape in shapes.values()], dim=1)
        named = zip(shapes.items(), parts, strict=True)
        return cls(**{name: part.reshape(-1, *shape) for (name, shape), part in named})

    @staticmethod
    def width(features: int) -> int:
        """Of a row that `stack` makes."""
        return 7 * features + 6


@dataclass
class SelectionScores:
    """Selection of S steps, everything [S, d_sae] in float32; NaN in a step without response tokens, or of unknown weights.

    Attributes:
        selection: of the step.
        positive, negative: of the rows on each side.
        variance: squared standard error, from the spread of the examples: NaN with fewer than two. An example's contribution
            comes from the tokens drawn of it, so what the draw adds is in their spread.
        activation: mean activation over the response tokens.
        frequency: share of the response tokens on which the feature is active.
    """

    selection: Tensor
    positive: Tensor
    negative: Tensor
    variance: Tensor
    activation: Tensor
    frequency: Tensor


def selection_column(name: str) -> str:
    """The column of a table that holds a statistic of selection, such as "standard_error"; "score" is selection itself."""
    if name == "score":
        return "selection"
    return f"response_{name}" if name in ("activation", "frequency") else f"selection_{name}"


def selection_scores(sums: SelectionSums, *, compared: bool) -> SelectionScores:
    """Scores of S steps.

    Args:
        sums: of every step, over all processes.
        compared: the loss raises some tokens and lowers others, so that activations are meant against their mean.
    """
    tokens = torch.where(sums.tokens > 0, sums.tokens, torch.nan)
    mean = sums.activation / tokens
    origin = mean if compared else mean * 0
    selection, positive, negative = selection_against_mean(
        sums.products, sums.weights[..., None], origin[..., None, :]
    ).unbind(-2)
    squares = selection_squares_against_mean(sums.squares, sums.crossed, sums.weight_squares, origin)
    n = sums.examples
    spread = (squares - selection.square() / n.clamp_min(1)).clamp_min(0)
    scores = (selection, positive, negative, variance_of_sum(spread, n[..., 0]), mean, sums.active / tokens)
    return SelectionScores(*(score.float() for score in scores))


def after_shared_prompt(ids: Tensor, attended: Tensor) -> Tensor:
    """The tokens of each pair's answers where a batch does not say where they begin: those after the last that both rows share.

    Args:
        ids, attended: [rows, tokens], row j and row j + rows/2 a pair, padded on the right.
    """
    first, second = ids.chunk(2)
    shared = (first == second).cumprod(1).bool()
    return attended.bool() & ~torch.cat([shared, shared])
