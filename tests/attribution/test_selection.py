"""Selection against brute force: c by finite differences, sums by encoding every token, the draw by its own spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.saes import make_sae
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from trl_sae_audit import FeatureDictionary
from trl_sae_audit.attribution.selection import (
    RESIDUAL_TOLERANCE,
    SelectionSums,
    TokenDraw,
    after_shared_prompt,
    draw_tokens,
    encode_rows,
    least_squares_weights,
    selection_scores,
)
from trl_sae_audit.models.language_head import LanguageHead
from trl_sae_audit.saes import dictionary as dictionaries
from trl_sae_audit.saes.encoder import SaeLensEncoder

ROWS, TOKENS, WIDTH, VOCABULARY = 6, 9, 24, 40
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.7,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS: dict[str, tuple[Any, Any, float]] = {
    "plain": (LlamaForCausalLM, LlamaConfig(**SIZE), 1.0),
    "temperature": (LlamaForCausalLM, LlamaConfig(**SIZE), 0.7),
    "soft-capped": (Gemma2ForCausalLM, Gemma2Config(**SIZE, final_logit_softcapping=3.0), 1.0),
    "scaled, temperature": (CohereForCausalLM, CohereConfig(**SIZE, logit_scale=0.3), 1.3),
}


@dataclass
class Batch:
    """Hidden states of some responses under a head, with reference log-probabilities near those of the model."""

    head: LanguageHead
    hidden: Tensor
    targets: Tensor
    counted: Tensor
    old: Tensor

    @classmethod
    def make(cls, name: str, dtype: torch.dtype = torch.float64) -> Batch:
        kind, config, temperature = HEADS[name]
        torch.manual_seed(0)
        model = kind(config).to(dtype)
        head = LanguageHead(model, model.get_decoder(), temperature)
        hidden = torch.randn(ROWS, TOKENS, WIDTH, dtype=dtype)
        targets = torch.randint(VOCABULARY, (ROWS, TOKENS))
        lengths = torch.tensor([9, 4, 7, 5, 8, 3])
        counted = torch.arange(TOKENS) < lengths[:, None]
        batch = cls(head, hidden, targets, counted, torch.zeros(ROWS, TOKENS, dtype=torch.float64))
        batch.old = batch.log_probs(hidden).detach() + 0.3 * torch.randn(ROWS, TOKENS, dtype=torch.float64)
        return batch

    def log_probs(self, hidden: Tensor) -> Tensor:
        flat = self.head.log_probs(hidden.flatten(0, 1), self.targets.flatten())
        return flat.view(ROWS, TOKENS).double()


Loss = Callable[[Tensor, Batch], Tensor]


def dpo(log_probs: Tensor, batch: Batch) -> Tensor:
    margin = ((log_probs - batch.old) * batch.counted).sum(1)
    return -F.logsigmoid(0.5 * (margin[:3] - margin[3:])).mean()


def kto(log_probs: Tensor, batch: Batch) -> Tensor:
    ratio = ((log_probs - batch.old) * batch.counted).sum(1)
    desirable = torch.tensor([1.0, 1, -1, 1, -1, -1])
    return (1 - torch.sigmoid(0.5 * desirable * (ratio - 0.2))).mean()


ADVANTAGES = torch.tensor([1.2, -0.7, 0.3, -1.1, 0.6, -0.3], dtype=torch.float64)


def grpo(log_probs: Tensor, batch: Batch) -> Tensor:
    """Clipped ratios and a penalty on the divergence from a reference, averaged in each response."""
    ratio = torch.exp(log_probs - batch.old)
    gain = torch.min(ratio * ADVANTAGES[:, None], torch.clamp(ratio, 0.8, 1.2) * ADVANTAGES[:, None])
    apart = (batch.old - 0.1) - log_probs
    loss = -gain + 0.04 * (torch.exp(apart) - apart - 1)
    return ((loss * batch.counted).sum(1) / batch.counted.sum(1)).mean()


def rloo(log_probs: Tensor, batch: Batch) -> Tensor:
    ratio = torch.exp(((log_probs - batch.old) * batch.counted).sum(1))
    return -torch.min(ratio * ADVANTAGES, torch.clamp(ratio, 0.8, 1.2) * ADVANTAGES).mean()


LOSSES: dict[str, Loss] = {"DPO": dpo, "KTO": kto, "GRPO": grpo, "RLOO": rloo}


def weights_of(batch: Batch, loss: Callable[[Tensor], Tensor]) -> Any:
    hidden = batch.hidden.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(hidden), hidden)
    rows = batch.counted.nonzero()[:, 0]
    _, slopes = batch.head.slopes(batch.hidden[batch.counted], batch.targets[batch.counted])
    return least_squares_weights(gradient[batch.counted], slopes, rows)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_weights_are_the_finite_differences_of_the_loss(name: str, head: str) -> None:
    batch, loss = Batch.make(head), LOSSES[name]
    found = weights_of(batch, lambda hidden: loss(batch.log_probs(hidden), batch))
    log_probs = batch.log_probs(batch.hidden).detach()
    expected = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    for row, token in batch.counted.nonzero().tolist():
        step = torch.zeros_like(log_probs)
        step[row, token] = 1e-6
        expected[row, token] = -(loss(log_probs + step, batch) - loss(log_probs - step, batch)) / 2e-6
    expected = expected[batch.counted]
    assert (found.values - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found.residual <= 1e-10
    if name == "GRPO":
        assert expected.unique().numel() > ROWS, "the clipping of tokens must be at work"


def test_weights_from_bfloat16() -> None:
    """All of a step in bfloat16, as a trainer would run it: each c within a twentieth, their mean within a hundredth."""
    batch = Batch.make("plain", torch.bfloat16)
    found = weights_of(batch, lambda hidden: dpo(batch.log_probs(hidden), batch))
    log_probs = batch.log_probs(batch.hidden).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(dpo(log_probs, batch), log_probs)
    ratio = found.values / -gradient[batch.counted]
    assert ((ratio - 1).abs() < 0.05).all()
    assert abs(ratio.mean() - 1) < 0.01
    assert found.residual < RESIDUAL_TOLERANCE / 10


def test_a_token_that_is_certain_takes_the_weight_of_its_row() -> None:
    """Its slope is rounding: what the division gives by itself is of any size."""
    torch.manual_seed(1)
    slopes = torch.randn(6, WIDTH)
    slopes[2] *= 1e-7
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    c = torch.tensor([2.0, 2, 2, -3, -3, -3])
    gradient = -c[:, None] * slopes + 1e-7 * torch.randn(6, WIDTH)
    found = least_squares_weights(gradient, slopes, rows)
    assert torch.allclose(found.values, c, rtol=1e-3)
    assert not torch.allclose(-(gradient * slopes).sum(1) / slopes.square().sum(1), c, rtol=1e-3)


@pytest.mark.parametrize("other", ["entropy", "divergence"])
def test_a_loss_of_the_whole_distribution_leaves_a_residual(other: str) -> None:
    batch = Batch.make("plain")
    torch.manual_seed(3)
    teacher = torch.randn(ROWS * TOKENS, VOCABULARY, dtype=torch.float64).softmax(1)

    def loss(hidden: Tensor) -> Tensor:
        log_p = batch.head.logits(hidden.flatten(0, 1)).log_softmax(1)
        if other == "entropy":
            return (log_p.exp() * log_p).sum(1).mean()
        return (teacher * (teacher.log() - log_p)).sum(1).mean()

    assert weights_of(batch, loss).residual > RESIDUAL_TOLERANCE


def test_no_gradient_is_no_answer() -> None:
    slopes = torch.randn(3, WIDTH)
    found = least_squares_weights(torch.zeros(3, WIDTH), slopes, torch.zeros(3))
    assert found.residual.isnan()
    assert not found.values.any()


# The draw


def responses(
    rows: int = 12, tokens: int = 50, features: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations that belong to their row and repeat every other token; weights that differ much; which tokens count."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(rows, 1, features, generator=generator, dtype=torch.float64)
    noise = torch.rand(rows, tokens, features, generator=generator, dtype=torch.float64)
    activations = level + noise + (torch.arange(tokens) % 2)[:, None]
    weights = torch.randn(rows, 1, generator=generator, dtype=torch.float64).exp()
    weights[rows // 2 :] *= -1
    lengths = torch.randint(3, tokens, (rows, 1), generator=generator)
    counted = (torch.arange(tokens) >= 4) & (torch.arange(tokens) < 4 + lengths)
    return activations, torch.where(counted, weights, 0.0), counted


def estimate(activations: Tensor, weights: Tensor, draw: TokenDraw) -> Tensor:
    flat, factor = activations.flatten(0, 1)[draw.index], weights.flatten()[draw.index] * draw.scale
    return factor @ flat


def exactly(activations: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("rt,rtf->f", weights, activations)


@pytest.mark.parametrize("budget", [24, 96, 400])
@pytest.mark.parametrize("known", [True, False])
def test_the_draw_is_unbiased(budget: int, known: bool) -> None:
    activations, weights, counted = responses()
    given = weights if known else torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(0)
    draws = [draw_tokens(given, counted, budget, generator) for _ in range(3000)]
    for factors in (weights, counted.double()):
        truth = exactly(activations, factors)
        values = torch.stack([estimate(activations, factors, draw) for draw in draws])
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - truth).abs() <= 4 * error + 1e-5 * truth.abs()).all()
        assert (error < 0.05 * truth.abs().max()).all()


def test_a_draw_takes_only_what_counts_and_as_much_as_asked() -> None:
    _, weights, counted = responses()
    draw = draw_tokens(weights, counted, 64, torch.Generator().manual_seed(0))
    assert len(draw.index) == 64
    assert counted.flatten()[draw.index].all()
    assert (draw.scale > 0).all()


def test_a_large_budget_takes_everything_once() -> None:
    activations, weights, counted = responses()
    for budget in (counted.numel(), 10 * counted.numel()):
        draw = draw_tokens(weights, counted, budget, torch.Generator())
        assert torch.allclose(estimate(activations, weights, draw), exactly(activations, weights), rtol=1e-6)
    draw = draw_tokens(torch.zeros_like(weights), counted, counted.numel() - 1, torch.Generator())
    assert torch.allclose(estimate(activations, weights, draw), exactly(activations, weights), rtol=1e-5)


def test_without_responses_nothing_counts() -> None:
    nothing = torch.zeros(4, 100, dtype=torch.bool)
    draw = draw_tokens(torch.zeros(4, 100), nothing, 32, torch.Generator())
    assert not draw.scale.any()


def test_the_draw_beats_as_many_tokens_of_any_weight() -> None:
    """Where weights differ; and it does not move the random numbers of anyone else."""
    activations, weights, counted = responses()
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    known = [draw_tokens(weights, counted, 48, generator) for _ in range(400)]
    even = [draw_tokens(torch.zeros_like(weights), counted, 48, generator) for _ in range(400)]
    assert torch.equal(state, torch.get_rng_state())

    def spread(draws: list[TokenDraw]) -> Tensor:
        errors = [estimate(activations, weights, draw) - exactly(activations, weights) for draw in draws]
        return torch.stack(errors).square().mean()

    assert spread(known) < 0.7 * spread(even)


# Encoding and sums


def dictionary_of(architecture: str) -> FeatureDictionary:
    sae = make_sae(architecture)
    return FeatureDictionary(sae.W_dec.data, "model.layers.1", architecture, encoder=SaeLensEncoder(sae))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
@pytest.mark.parametrize("compared", [True, False])
def test_selection_equals_encoding_every_token(
    architecture: str, compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σ c·(a − ā), its sides and its standard error, written out in float64."""
    dictionary = dictionary_of(architecture)
    torch.manual_seed(0)
    hidden = 2 * torch.randn(6, 11, dictionary.d_model) + 1
    counted = torch.arange(11) >= torch.tensor([[3], [0], [10], [5], [2], [7]])
    weights = torch.where(counted, torch.randn(6, 11), 0.0)
    hidden[~counted] = torch.nan
    monkeypatch.setattr(dictionaries, "_TOKEN_BYTES", 4 * dictionary.d_sae * 7)
    assert dictionary.tokens_at_once == 7
    draw = draw_tokens(weights, counted, counted.numel(), torch.Generator())
    found = encode_rows(
        dictionary,
        hidden.flatten(0, 1)[draw.index],
        weights.flatten()[draw.index],
        weights.sum(1),
        draw.index // 11,
        draw,
        counted.sum(),
        torch.zeros(len(draw.index), dtype=torch.bool),
    )
    sides = torch.tensor([[1.0] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    sums = SelectionSums.of(found.products, found.weights, sides, paired=True)
    packed = SelectionSums.stack([sums.with_responses(found.responses)] * 2)
    assert packed.shape == (2, SelectionSums.width(dictionary.d_sae))
    scores = selection_scores(SelectionSums.unstack(packed, dictionary.d_sae), compared=compared)

    encoded = [dictionary.encode(hidden[row, counted[row]]).double() for row in range(6)]
    every = torch.cat(encoded)
    origin = every.mean(0) if compared else 0.0
    rows = torch.stack([weights[row, counted[row]].double() @ (encoded[row] - origin) for row in range(6)])
    pairs = rows[:3] + rows[3:]
    expected = {
        "selection": rows.sum(0),
        "positive": rows[:3].sum(0),
        "negative": rows[3:].sum(0),
        "variance": 3 * pairs.var(0, unbiased=True),
        "activation": every.mean(0),
        "frequency": (every != 0).double().mean(0),
    }
    for name, truth in expected.items():
        for value in getattr(scores, name):
            assert torch.allclose(value.double(), truth, atol=1e-4, rtol=1e-4), name
        assert truth.abs().max() > 0.1, name


def test_parts_of_a_step_add_up() -> None:
    torch.manual_seed(0)
    products, weights = torch.randn(8, 5), torch.randn(8)
    sides = torch.stack([torch.ones(8), torch.arange(8) < 4, torch.arange(8) >= 4]).float()
    whole = SelectionSums.join([SelectionSums.of(products, weights, sides, paired=False)], 2.0)
    parts = [
        SelectionSums.of(products[rows], weights[rows], sides[:, rows], paired=False)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    joined = SelectionSums.join([*parts, SelectionSums.zero(5, torch.device("cpu"))], 2.0)
    for name, value in vars(whole).items():
        assert torch.allclose(value, getattr(joined, name), atol=1e-6), name
    halved = SelectionSums.of(products / 2, weights / 2, sides, paired=False)
    for name, value in vars(halved).items():
        assert torch.allclose(value, getattr(whole, name), atol=1e-6), name


@pytest.mark.parametrize("missing", ["weights", "responses"])
def test_what_is_not_known_is_absent(missing: str) -> None:
    products = torch.full((4, 5), torch.nan if missing == "weights" else 1.0)
    sums = SelectionSums.of(products, torch.ones(4), torch.ones(3, 4), paired=False)
    scores = selection_scores(SelectionSums.unstack(SelectionSums.stack([sums]), 5), compared=True)
    assert scores.selection.isnan().all()


def test_the_standard_error_includes_the_draw() -> None:
    """Over many steps of fresh pairs, the variance a step states of itself is that of the sums."""
    totals, stated, errors = [], [], []
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        activations, weights, counted = responses(seed=step)
        draw = draw_tokens(weights, counted, 24, generator)
        factor = weights.flatten()[draw.index] * draw.scale
        products = torch.zeros(12, 5, dtype=torch.float64)
        products.index_add_(0, draw.index // 50, factor[:, None] * activations.flatten(0, 1)[draw.index])
        sums = SelectionSums.of(products.float(), torch.zeros(12), torch.ones(3, 12), paired=True)
        sums.tokens = torch.ones(1)
        rows = SelectionSums.unstack(SelectionSums.stack([sums]), 5)
        stated.append(selection_scores(rows, compared=False).variance[0])
        totals.append(products.sum(0))
        errors.append(products.sum(0) - exactly(activations, weights))
    measured = torch.stack(totals).var(0)
    ratio = torch.stack(stated).mean(0) / measured
    assert (torch.stack(errors).var(0) > 0.01 * measured).all(), "the draw must matter here"
    assert ((ratio > 0.75) & (ratio < 1.33)).all(), ratio


def test_where_the_answers_of_a_pair_begin() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 9, 1, 2], [5, 6, 3, 8, 4], [5, 6, 9, 1, 7]])
    attended = torch.tensor([[1, 1, 1, 1, 0], [1] * 5, [1] * 5, [1] * 5])
    expected = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    assert torch.equal(after_shared_prompt(ids, attended), expected)
