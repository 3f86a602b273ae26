"""The reservoir of a run's contexts against brute force over all micro-batches."""

from __future__ import annotations

import pytest
import torch

from trl_sae_audit.attribution import contexts
from trl_sae_audit.attribution.contexts import ContextReservoir, Peaks

D_SAE, KEPT = 7, 3


def micro_batches(n: int = 20):
    """Activations [rows, tokens, d_sae], ids and response tokens of micro-batches; rows end in padding."""
    generator = torch.Generator().manual_seed(0)
    for number in range(n):
        activations = torch.rand(2, 12, D_SAE, generator=generator)
        ids = torch.randint(5, 100, (2, 12), generator=generator) + 100 * number
        counted = torch.zeros(2, 12, dtype=torch.bool)
        counted[0, 3:10], counted[1, 5:12] = True, True
        yield activations, ids, counted


def peaks_of(activations, ids, counted):
    seen = torch.where(counted[..., None], activations, 0.0).flatten(0, 1)
    return Peaks(*seen.max(0), ids, counted, None)


@pytest.mark.parametrize("settle_every", [1, 3, 100])
def test_the_strongest_token_of_the_strongest_micro_batches(settle_every):
    reservoir = ContextReservoir(D_SAE, torch.device("cpu"), KEPT)
    every = []
    for number, (activations, ids, counted) in enumerate(micro_batches()):
        reservoir.add(peaks_of(activations, ids, counted))
        if number % settle_every == settle_every - 1:
            reservoir.settle()
        strongest = torch.where(counted[..., None], activations, 0.0)
        for feature in range(D_SAE):
            place = int(strongest[..., feature].argmax())
            row, token = divmod(place, 12)
            every.append((feature, float(activations[row, token, feature]), row, token, ids[row]))
    places, windows = reservoir.take()
    for feature in range(D_SAE):
        best = sorted((entry for entry in every if entry[0] == feature), key=lambda entry: -entry[1])[:KEPT]
        own = places.take(places.feature == feature)
        found = sorted(
            zip(own.activation.tolist(), own.text.tolist(), strict=True), key=lambda pair: -pair[0]
        )
        assert [activation for activation, _ in found] == [entry[1] for entry in best]
        for (_, text), (_, _, row, token, ids) in zip(found, best, strict=True):
            window, begin = windows[text], (3, 5)[row]
            end = (10, 12)[row]
            assert window.tokens[window.place] == ids[token]
            assert list(window.tokens) == ids[begin : min(end, token + 9)].tolist()
            assert list(window.prompt) == ids[:begin].tolist()
            assert (window.row, window.rows) == (row, 2)


def test_what_was_taken_is_taken_once_and_only_what_is_stronger_comes_after():
    reservoir = ContextReservoir(D_SAE, torch.device("cpu"), KEPT)
    batches = [peaks_of(*batch) for batch in micro_batches()]
    for batch in batches[:10]:
        reservoir.add(batch)
    first, _ = reservoir.take()
    assert len(first) == KEPT * D_SAE
    assert len(reservoir.take()[0]) == 0
    for batch in batches[10:]:
        reservoir.add(batch)
    second, _ = reservoir.take()
    whole = ContextReservoir(D_SAE, torch.device("cpu"), KEPT)
    for batch in batches:
        whole.add(batch)
    expected, _ = whole.take()
    for feature in range(D_SAE):
        parts = [part.activation[part.feature == feature].tolist() for part in (first, second)]
        assert sorted([*parts[0], *parts[1]])[-KEPT:] == sorted(
            expected.activation[expected.feature == feature]
        )


def test_packed_examples_keep_to_themselves():
    ids = torch.arange(100, 112)[None]
    counted = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    peaks = Peaks(torch.ones(1), torch.tensor([7]), ids, counted, torch.tensor([4, 6, 2]))
    reservoir = ContextReservoir(1, torch.device("cpu"), 1)
    reservoir.add(peaks)
    _, windows = reservoir.take()
    (window,) = windows.values()
    assert window.prompt.tolist() == [104, 105]
    assert window.tokens.tolist() == [106, 107, 108, 109]
    assert (window.place, window.row, window.rows) == (1, 1, 3)


def test_texts_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(contexts, "MOST_PENDING", 100)
    reservoir = ContextReservoir(D_SAE, torch.device("cpu"), KEPT)
    for batch in micro_batches():
        reservoir.add(peaks_of(*batch))
        if reservoir.is_full:
            reservoir.settle()
        assert len(reservoir._texts) <= 5
        assert len(reservoir._windows) <= KEPT * D_SAE
