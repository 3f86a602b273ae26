"""Attention sinks: found by their norm, row by row, and left out of fit and activations."""

from __future__ import annotations

import torch

from trl_sae_audit.models.attention_sinks import find_attention_sinks


def states() -> torch.Tensor:
    hidden = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.nn.functional.normalize(hidden, dim=-1)
    hidden[0, 3] *= 100
    hidden[1] *= 50  # a row of long states has no sinks
    return hidden


def test_tokens_of_more_than_ten_times_their_rows_median() -> None:
    counted = torch.ones(2, 6, dtype=torch.bool)
    assert find_attention_sinks(states(), counted).nonzero().tolist() == [[0, 3]]


def test_what_does_not_count_neither_is_one_nor_moves_the_median() -> None:
    hidden = states()
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, 3] = False
    hidden[0, 4:] *= torch.nan
    counted[0, 4:] = False
    assert not find_attention_sinks(hidden, counted).any()


def test_tokens_beside_those_that_make_the_median() -> None:
    hidden = states()
    counted = torch.zeros(2, 6, dtype=torch.bool)
    counted[:, 4:] = True
    assert not find_attention_sinks(hidden, counted).any()
    every = torch.ones_like(counted)
    assert find_attention_sinks(hidden, counted, every).nonzero().tolist() == [[0, 3]]


def test_a_number_that_is_none_does_not_move_the_median() -> None:
    hidden = torch.cat([states(), torch.full((2, 7, 8), torch.nan)], 1)
    assert find_attention_sinks(hidden, torch.ones(2, 13, dtype=torch.bool)).nonzero().tolist() == [[0, 3]]


def test_as_exact_as_the_states() -> None:
    """The lower of the two middle norms of an even number, in each type that a model computes in."""
    hidden = torch.tensor([[1.0, 2.0, 4.0, 21.0]])[..., None].expand(1, 4, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = find_attention_sinks(hidden.to(dtype), torch.ones(1, 4, dtype=torch.bool))
        assert found.tolist() == [[False, False, False, True]]


def test_a_row_of_nothing_has_none() -> None:
    assert not find_attention_sinks(states(), torch.zeros(2, 6, dtype=torch.bool)).any()
