"""Sampling answers of a language model, such that two models can be compared on the same luck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .residual_stream import evaluation_mode


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        answers: for each prompt; an advantage needs two.
        max_new_tokens: longest answer.
        temperature: of sampling, as in training.
        seed: of sampling.
    """

    answers: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0


@torch.no_grad()
def sample_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[list[list[int]]]:
    """Token ids of sampled answers, `sampling.answers` to each prompt, with the end of sequence where it was reached.

    Every batch has its own random stream, made from the seed: two models asked the same draw each token with the
    same random numbers, so that their answers differ where the models do and not by luck. The model's modes
    and torch's generators are left as they were.

    Args:
        model: a causal language model, wrapped or not.
        tokenizer: its tokenizer; the end-of-sequence id ends an answer.
        prompts: token ids, without padding.
        sampling: how.
        batch_size: answers sampled at a time; part of what decides the random numbers.
        progress: show a bar.
    """
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    generation = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=pad,
        eos_token_id=end,
    )
    wanted = [row for row in range(len(prompts)) for _ in range(sampling.answers)]
    order = sorted(wanted, key=lambda row: len(prompts[row]))
    answers: list[list[list[int]]] = [[] for _ in prompts]
    bar = tqdm(
        range(0, len(order), batch_size), desc="Sampling", unit=" batches", disable=None if progress else True
    )
    with evaluation_mode(model), torch.random.fork_rng():
        for start in bar:
            rows = order[start : start + batch_size]
            longest = max(len(prompts[row]) for row in rows)
            ids = torch.full((len(rows), longest), pad)
            attended = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
                attended[place, longest - len(prompts[row]) :] = 1
            torch.manual_seed(hash((sampling.seed, start)) % 2**63)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=attended.to(device), generation_config=generation
            )
            for row, answer in zip(rows, output[:, longest:].tolist(), strict=True):
                answers[row].append(answer[: answer.index(end) + 1] if end in answer else answer)
    return answers


def answer_batches(
    tokenizer: PreTrainedTokenizerBase,
    answered: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Ids of (prompt, answer) as right-padded batches, those of like length together.

    Yields:
        Which of `answered` the rows are, and `input_ids`, `attention_mask`, `completion_mask` [rows, tokens].
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(answered)), key=lambda place: sum(map(len, answered[place])))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        ids = torch.full((len(places), max(sum(map(len, answered[place])) for place in places)), pad)
        attended, counted = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, place in enumerate(places):
            prompt, answer = answered[place]
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            attended[row, : len(prompt) + len(answer)] = 1
            counted[row, len(prompt) : len(prompt) + len(answer)] = 1
        yield places, {"input_ids": ids, "attention_mask": attended, "completion_mask": counted}


def sampled_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    together: int,
    batch_size: int,
    progress: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Answers from `sample_ids`, `together` at a time, as batches of `answer_batches`, of `batch_size` rows, on the model's device."""
    answers = sample_ids(model, tokenizer, prompts, sampling, batch_size=together, progress=progress)
    answered = [(prompt, answer) for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    device = next(model.parameters()).device
    for _, batch in answer_batches(tokenizer, answered, batch_size):
        yield {name: value.to(device) for name, value in batch.items()}
