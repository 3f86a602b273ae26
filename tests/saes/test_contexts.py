"""The strongest places against brute force, in parts or whole; windows of two kinds of tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_sae_audit.saes.contexts import PlaceKeeper, Places, Window, decode_windows, drawn, strongest

TEXT = "Great question! You're absolutely right: the café is über 2,5 km away 😀 — yes."


def stream(seed: int, n: int = 4000, d_sae: int = 30, texts: int = 60) -> Places:
    rng = np.random.default_rng(seed)
    activation = rng.standard_normal(n).astype(np.float32)
    return Places(
        rng.integers(0, d_sae, n).astype(np.int32),
        activation,
        rng.integers(0, texts, n),
        rng.integers(0, 9, n).astype(np.int32),
    )


def brute_force(places: Places, kept: int) -> list[tuple[int, int, float]]:
    rows = []
    for feature in range(30):
        best: dict[int, float] = {}
        for f, a, t in zip(places.feature, places.activation, places.text, strict=True):
            if f == feature and abs(a) > abs(best.get(int(t), 0.0)):
                best[int(t)] = float(a)
        ranked = sorted(best.items(), key=lambda item: -abs(item[1]))[:kept]
        rows += [(feature, text, activation) for text, activation in ranked]
    return rows


def rows_of(places: Places) -> list[tuple[int, int, float]]:
    return list(zip(places.feature.tolist(), places.text.tolist(), places.activation.tolist(), strict=True))


def test_the_strongest_places_are_those_of_brute_force():
    places = stream(0)
    assert rows_of(strongest(places, 5)) == brute_force(places, 5)


def test_a_stream_in_pieces_and_halves_merged_give_the_same():
    places = stream(1)
    whole, sample = strongest(places, 5), drawn(places, 3)
    order = np.argsort(places.text, kind="stable")  # a text is seen whole
    keeper, halves = PlaceKeeper(30, 5, 3), [PlaceKeeper(30, 5, 3), PlaceKeeper(30, 5, 3)]
    for texts in np.array_split(np.arange(60), 17):
        part = places.take(order[np.isin(places.text[order], texts)])
        keeper.add(part)
        halves[int(texts[0]) % 2].add(part)
    merged = strongest(Places.join(half.strongest for half in halves), 5)
    merged_sample = drawn(Places.join(half.drawn for half in halves), 3)
    assert rows_of(keeper.strongest) == rows_of(whole) == rows_of(merged)
    assert rows_of(keeper.drawn) == rows_of(sample) == rows_of(merged_sample)


def test_the_draw_is_even():
    """Of 400 texts that show a feature each is drawn in about 4 of 400 features: no more often if it is strong."""
    features, texts = np.meshgrid(np.arange(400), np.arange(400), indexing="ij")
    activation = (1.0 + texts).astype(np.float32)
    places = Places(
        *(values.reshape(-1) for values in (features.astype(np.int32), activation, texts)),
        np.zeros(160_000, np.int32),
    )
    found = drawn(places, 4)
    assert len(found) == 1600
    counts = np.bincount(found.text, minlength=400)
    assert counts[:200].sum() == pytest.approx(800, abs=100)  # five standard deviations
    assert counts.max() <= 16


def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"]
    )
    inner.train_from_iterator([TEXT.replace("😀", "")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: words begin with ▁, and what is no token is bytes."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", "<eos>", *byte_tokens])
    inner.train_from_iterator([TEXT.replace("😀", "")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_windows_are_the_text(kind):
    tokenizer = kind()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    parts = decode_windows(tokenizer, [Window(tuple(ids), place) for place in range(len(ids))])
    assert {"".join(part) for part in parts} == {TEXT}
    assert all(at for _, at, _ in parts)
    emoji = [at for _, at, _ in parts if "😀" in at]
    assert len(emoji) > 1  # every token that holds a part of it
    assert {at.strip() for at in emoji} == {"😀"}
    for place in range(len(ids)):
        before, at, after = decode_windows(tokenizer, [Window.around(ids, place)])[0]
        assert before + at + after in TEXT
        assert " ".join((before + at).split()).endswith(" ".join(parts[place][1].split()))
