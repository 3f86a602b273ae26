"""Padding and batches, against what is written down by hand."""

from __future__ import annotations

import torch
from helpers.worlds import make_tokenizer

from trl_sae_audit.models.batches import answer_batches, batched, pad
from trl_sae_audit.models.tokenizers import padding_id


def test_rows_are_padded_on_either_side() -> None:
    ids, real = pad([[5, 6], [7], (8, 9, 10)], 3)
    assert ids.tolist() == [[5, 6, 3], [7, 3, 3], [8, 9, 10]]
    assert real.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    ids, real = pad([[5, 6], [7]], side="left")
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert real.tolist() == [[True, True], [False, True]]
    assert pad([[1], []])[0].dtype == torch.long


def test_batches_keep_the_order_and_end_with_a_short_one() -> None:
    assert [list(part) for part in batched([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4], [5]]
    assert list(batched([], 2)) == []


def test_answers_of_like_length_are_together_and_marked() -> None:
    tokenizer = make_tokenizer()
    answered = [([4, 5, 6], [7, 8]), ([4], [9]), ([5], [6])]
    (places, batch), (rest, last) = answer_batches(tokenizer, answered, 2)
    assert (places, rest) == ([1, 2], [0])
    assert batch["input_ids"].tolist() == [[4, 9], [5, 6]]
    assert last["completion_mask"].tolist() == [[0, 0, 0, 1, 1]]
    assert last["attention_mask"].tolist() == [[1] * 5]
    assert padding_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
