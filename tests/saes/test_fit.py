"""Fit of a dictionary, against the definitions written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from torch import Tensor

from trl_sae_audit import FeatureDictionary, load_dictionary
from trl_sae_audit.saes.fit import HealthTotals, health

WIDTH, FEATURES, ACTIVE = 12, 40, 5


def topk_sae(**settings: object) -> SAE:
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=FEATURES, k=ACTIVE, **settings))
    sae.b_dec.data.normal_()
    return sae


@pytest.fixture(scope="module")
def dictionary() -> FeatureDictionary:
    return load_dictionary(topk_sae(), hook_point="model.layers.0", name="topk")


def tokens(count: int, mean: float = 3.0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)) + mean


def reference(dictionary: FeatureDictionary, hidden: Tensor) -> tuple[float, float, float]:
    activations = dictionary.encode(hidden)
    rebuilt = dictionary.reconstruct(hidden, activations).double()
    wide = hidden.double()
    fvu = (wide - rebuilt).square().sum() / (wide - wide.mean(0)).square().sum()
    active = activations != 0
    return float(fvu), float(active.double().sum(1).mean()), float((~active.any(0)).double().mean())


def test_matches_the_definitions(dictionary: FeatureDictionary) -> None:
    hidden = tokens(50)
    result = health(dictionary, hidden)
    fvu, l0, dead = reference(dictionary, hidden)
    assert result.fvu == pytest.approx(fvu, rel=1e-6)
    assert result.l0 == pytest.approx(l0)
    assert result.dead == pytest.approx(dead)
    assert result.tokens == 50


def test_token_fvu_is_not_flattered_by_a_few_huge_tokens() -> None:
    """One feature explains the outliers and nothing else."""
    sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=WIDTH, k=1))
    sae.W_dec.data = torch.eye(WIDTH)
    sae.W_enc.data = torch.zeros(WIDTH, WIDTH)
    sae.W_enc.data[0, 0] = 1.0
    hidden = tokens(400, mean=0.0)
    hidden[:4, 0] = 1000.0
    hidden[:4, 1:] = 0.0
    result = health(load_dictionary(sae, hook_point="x.0"), hidden.roll(100, dims=0))
    assert result.fvu < 0.01
    assert result.token_fvu > 0.5


def test_token_fvu_matches_its_definition(dictionary: FeatureDictionary) -> None:
    hidden = tokens(50)
    lost = (hidden - dictionary.reconstruct(hidden, dictionary.encode(hidden))).double().square().sum(1)
    shares = (lost / (hidden - hidden.median(0).values).double().square().sum(1)).clamp_max(1.0)
    assert health(dictionary, hidden).token_fvu == pytest.approx(float(shares.mean()), rel=1e-5)


def test_does_not_depend_on_the_cut_into_updates(dictionary: FeatureDictionary) -> None:
    hidden = tokens(64)
    totals = HealthTotals(dictionary)
    for piece in hidden.split([1, 20, 43]):
        totals.update(piece)
    whole, pieces = health(dictionary, hidden), totals.result()
    assert pieces.fvu == pytest.approx(whole.fvu, rel=1e-6)
    assert (pieces.l0, pieces.dead, pieces.tokens) == (whole.l0, whole.dead, whole.tokens)


def test_masked_tokens_do_not_count_even_if_not_finite(dictionary: FeatureDictionary) -> None:
    hidden = tokens(30)
    spoiled = torch.cat([torch.full((4, WIDTH), math.nan), hidden, torch.full((3, WIDTH), math.inf)])
    mask = torch.cat([torch.zeros(4), torch.ones(30), torch.zeros(3)])
    assert health(dictionary, spoiled, mask) == health(dictionary, hidden)


def test_masked_zeros_do_not_spoil_run_time_normalisation() -> None:
    dictionary = load_dictionary(topk_sae(normalize_activations="constant_norm_rescale"), hook_point="x.0")
    hidden, mask = tokens(8), torch.tensor([1.0] * 6 + [0.0] * 2)
    assert math.isfinite(health(dictionary, hidden, mask).fvu)


def test_a_far_mean_costs_no_digits(dictionary: FeatureDictionary) -> None:
    hidden = tokens(200, mean=3000.0)
    fvu, _, _ = reference(dictionary, hidden)
    assert health(dictionary, hidden).fvu == pytest.approx(fvu, rel=1e-4)


def test_a_perfect_dictionary_and_a_useless_one() -> None:
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=2 * WIDTH, k=WIDTH))
    sae.W_dec.data, sae.W_enc.data = both, both.T.contiguous()
    hidden = tokens(40)
    assert health(load_dictionary(sae, hook_point="x.0"), hidden).fvu == pytest.approx(0, abs=1e-10)
    sae.W_enc.data = torch.zeros_like(sae.W_enc)
    sae.b_dec.data = hidden.mean(0)
    silent = health(load_dictionary(sae, hook_point="x.0"), hidden)
    assert silent.fvu == pytest.approx(1, rel=1e-6)
    assert (silent.l0, silent.dead) == (0, 1)


def test_raw_directions_have_tokens_but_no_fit() -> None:
    raw = FeatureDictionary(torch.randn(4, WIDTH), "x.0", "raw")
    result = health(raw, tokens(7))
    assert result.tokens == 7
    assert math.isnan(result.fvu)
    assert math.isnan(result.l0)
    assert math.isnan(result.dead)


def test_no_tokens_is_not_a_number(dictionary: FeatureDictionary) -> None:
    assert math.isnan(HealthTotals(dictionary).result().fvu)
    assert math.isnan(health(dictionary, tokens(3), torch.zeros(3)).l0)


def test_reset_forgets(dictionary: FeatureDictionary) -> None:
    totals = HealthTotals(dictionary)
    totals.update(tokens(9))
    totals.reset()
    totals.update(tokens(5))
    assert totals.result() == health(dictionary, tokens(5))


def test_frequency_sums_to_l0(dictionary: FeatureDictionary) -> None:
    totals = HealthTotals(dictionary)
    totals.update(tokens(20))
    assert float(totals.frequency().sum()) == pytest.approx(totals.result().l0, rel=1e-6)


def test_half_precision_hidden_states(dictionary: FeatureDictionary) -> None:
    hidden = tokens(20).to(torch.bfloat16)
    assert health(dictionary, hidden) == health(dictionary, hidden.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_update_never_waits_for_the_device(dictionary: FeatureDictionary) -> None:
    totals = HealthTotals(dictionary.to("cuda"))
    hidden, mask = tokens(64).cuda(), torch.ones(64, device="cuda")
    totals.update(hidden, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        totals.update(hidden, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert totals.result().tokens == 128
