"""Rows of token ids as batches: a few at a time, padded, and which of the places are real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .tokenizers import padding_id

Item = TypeVar("Item")


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """`items` in their order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def token_batches(lengths: Sequence[int], tokens: int, rows: int | None = None) -> Iterator[list[int]]:
    """Places of rows as batches, the longest first, none with more than `tokens` places, padding included, but for a longer row
    alone, nor with more than `rows` rows."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        longest = lengths[batch[0]] if batch else lengths[place]
        if batch and (longest * (len(batch) + 1) > tokens or len(batch) == rows):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def pad(
    rows: Sequence[Sequence[int]], value: int = 0, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Token ids padded with `value`, and which of them are real: both [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    attended = torch.zeros((len(rows), longest), dtype=torch.bool)
    for number, row in enumerate(rows):
        places = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, places] = torch.tensor(row, dtype=torch.long)
        attended[number, places] = True
    return ids, attended


def pad_answers(answered: Sequence[tuple[Sequence[int], Sequence[int]]], value: int) -> dict[str, Tensor]:
    """Ids of (prompt, answer) as `input_ids`, `attention_mask` and `completion_mask` [rows, tokens], padded on the right."""
    ids, attended = pad([[*prompt, *answer] for prompt, answer in answered], value)
    starts = torch.tensor([[len(prompt)] for prompt, _ in answered])
    answers = attended & (torch.arange(ids.shape[1]) >= starts)
    return {"input_ids": ids, "attention_mask": attended.long(), "completion_mask": answers.long()}


def answer_batches(
    tokenizer: PreTrainedTokenizerBase,
    answered: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Answers as batches, those of like length together.

    Yields:
        Which of `answered` the rows are, and what `pad_answers` makes of them.
    """
    order = sorted(range(len(answered)), key=lambda place: sum(map(len, answered[place])))
    for places in batched(order, batch_size):
        yield list(places), pad_answers([answered[place] for place in places], padding_id(tokenizer))
