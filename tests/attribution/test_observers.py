"""Token scores from some of the tokens, against those from all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from helpers.worlds import D_MODEL, make_sae_dictionary

from trl_sae_audit.attribution.observers import TokenScoreObserver


def view(seed: int = 0) -> Any:
    """Tokens of six rows, of which some count and few have most of the gradient."""
    generator = torch.Generator().manual_seed(seed)
    counted = torch.rand(6, 20, generator=generator) < 0.7
    size = torch.rand(6, 20, 1, generator=generator) ** 4
    gradient = size * torch.randn(6, 20, D_MODEL, generator=generator)
    hidden = torch.randn(6, 20, D_MODEL, generator=generator)
    return SimpleNamespace(gradient=gradient, hidden=hidden, forward=SimpleNamespace(loss_positions=counted))


def scores_of(budget: int, step: int) -> tuple[np.ndarray, np.ndarray, float]:
    observer = TokenScoreObserver(make_sae_dictionary(), budget, (1, 2))
    observer.begin(step, 0)
    observer(view())
    found = observer.take()
    return (
        found.projected_squares.numpy(),
        found.activation_attribution.numpy(),
        float(found.gradient_squares),
    )


def test_all_tokens_are_those_that_count() -> None:
    dictionary, tokens = make_sae_dictionary(), view()
    g, h = (values[tokens.forward.loss_positions] for values in (tokens.gradient, tokens.hidden))
    squares, attribution, size = scores_of(10**6, 0)
    projected = g @ dictionary.directions.T
    np.testing.assert_allclose(squares, projected.square().sum(0), rtol=1e-4)
    norms = dictionary.norms
    np.testing.assert_allclose(
        attribution, -(projected * dictionary.encode(h) * norms).sum(0), rtol=1e-3, atol=1e-5
    )
    assert size == float(g.square().sum())


def test_no_feature_is_active_at_an_attention_sink() -> None:
    dictionary, tokens = make_sae_dictionary(), view()
    counted = tokens.forward.loss_positions
    sinks = torch.zeros_like(counted)
    sinks[counted.nonzero()[::17].unbind(1)] = True
    tokens.hidden[sinks] *= 100
    observer = TokenScoreObserver(dictionary)
    observer.begin(0, 0)
    observer(tokens)
    found = observer.take()
    g, h, usual = (values[counted] for values in (tokens.gradient, tokens.hidden, ~sinks))
    projected = g @ dictionary.directions.T
    np.testing.assert_allclose(found.projected_squares, projected.square().sum(0), rtol=1e-4)
    effects = projected * dictionary.encode(h) * dictionary.norms
    np.testing.assert_allclose(found.activation_attribution, -effects[usual].sum(0), rtol=1e-3, atol=1e-5)
    assert (effects[~usual].sum(0).abs() > 1).any()
    counting = TokenScoreObserver(dictionary, attention_sinks=True)
    counting.begin(0, 0)
    counting(tokens)
    np.testing.assert_allclose(counting.take().activation_attribution, -effects.sum(0), rtol=1e-3, atol=1e-3)


def test_some_tokens_are_right_on_average_and_the_same_whenever_drawn_again() -> None:
    everything = scores_of(10**6, 0)
    drawn = [scores_of(10, step) for step in range(400)]
    for part in (0, 1):
        values = np.stack([one[part] for one in drawn])
        error = values.std(0) / np.sqrt(len(values))
        assert (values.std(0) > 0).any()
        gap = np.abs(values.mean(0) - everything[part])
        assert (gap <= 4.5 * error + 1e-6).all()
    assert {one[2] for one in drawn} == {everything[2]}
    assert all(np.array_equal(*pair) for pair in zip(drawn[7], scores_of(10, 7), strict=True))
