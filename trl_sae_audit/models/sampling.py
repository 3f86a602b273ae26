"""Sampling answers of a language model, such that two models can be compared on the same luck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from ..errors import AuditError
from .batches import pad
from .language_head import causal_model
from .prompt_cache import PromptCache, can_continue_prompts
from .residual_stream import evaluation_mode
from .token_ids import Ids
from .tokenizers import padding_id


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
    same random numbers, so that their answers differ where the models do and not by luck. A prompt is read once for all of its
    answers in a batch, where the model remembers it as keys and values. Tokens are drawn from the
    model's own distribution at the temperature, whatever its `generation_config.json` says. The model's modes and torch's
    generators are left as they were.

    Args:
        model: a causal language model, wrapped or not.
        tokenizer: its tokenizer; what `end_ids` finds ends an answer.
        prompts: token ids, without padding.
        sampling: how.
        batch_size: answers sampled at a time; part of what decides the random numbers.
        progress: show a bar.
    """
    device = next(model.parameters()).device
    ends = end_ids(model, tokenizer)
    generation = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=ends or None,
    )
    wanted = [row for row in range(len(prompts)) for _ in range(sampling.answers)]
    order = sorted(wanted, key=lambda row: len(prompts[row]))
    answers: list[list[list[int]]] = [[] for _ in prompts]
    cache = _SharedPrompts.of(model) if sampling.answers > 1 else None
    bar = tqdm(
        range(0, len(order), batch_size), desc="Sampling", unit=" batches", disable=None if progress else True
    )
    with evaluation_mode(model), without_own_generation_config(model), torch.random.fork_rng():
        for start in bar:
            rows = order[start : start + batch_size]
            ids, attended = pad([prompts[row] for row in rows], padding_id(tokenizer), side="left")
            given = {} if cache is None else cache.read([tuple(prompts[row]) for row in rows])
            torch.manual_seed(hash((sampling.seed, start)) % 2**63)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=attended.long().to(device),
                generation_config=generation,
                **given,
            )
            for row, answer in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                length = _length(answer, ends)
                answers[row].append(answer[: length + 1])
    return answers


@torch.no_grad()
def answer_greedily(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[list[int]]:
    """Token ids of the most likely answer to each prompt, token by token, without the end of sequence.

    Args:
        model: a causal language model, wrapped or not.
        tokenizer: its tokenizer; what `end_ids` finds ends an answer.
        prompts: token ids, without padding.
        max_new_tokens: longest answer.
        batch_size: prompts at a time.
    """
    device, ends = next(model.parameters()).device, end_ids(model, tokenizer)
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=ends or None,
    )
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with evaluation_mode(model), without_own_generation_config(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, attended = pad([prompts[row] for row in rows], padding_id(tokenizer), side="left")
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=attended.long().to(device),
                generation_config=generation,
            )
            for row, answer in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[row] = answer[: _length(answer, ends)]
    return [answers[row] for row in range(len(prompts))]


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's end of sequence, and what ends a turn by the model's own generation configuration.

    Gemma's turns end with a token that is not the end of sequence, for one. TRL's on-policy trainers stop at both too. An id that
    is no special token of the tokenizer does not count: a configuration's default for another vocabulary.
    """
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for part in _generators(model):
        own = part.generation_config.eos_token_id
        for number in own if isinstance(own, list) else [own]:
            if number in special and number not in found:
                found.append(number)
    return found


def _length(answer: Sequence[int], ends: Sequence[int]) -> int:
    """Tokens before the first that ends it."""
    return next((place for place, token in enumerate(answer) if token in ends), len(answer))


def _generators(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, GenerationMixin)]


class _SharedPrompts:
    """Reads every distinct prompt of a batch once, but for its last token."""

    def __init__(self, decoder: Any) -> None:
        self._cache = PromptCache(decoder, lambda forward: forward())

    @classmethod
    def of(cls, model: nn.Module) -> _SharedPrompts | None:
        """None where the model cannot go on from keys and values, or learns virtual tokens before the prompt."""
        try:
            decoder = causal_model(model).get_decoder()
        except AuditError:
            return None
        return cls(decoder) if can_continue_prompts(decoder) else None

    def read(self, prompts: Sequence[Ids]) -> dict[str, Any]:
        """What `generate` is given besides the prompts of a batch; nothing where they are too short, or all distinct."""
        begun = list(dict.fromkeys(prompt[:-1] for prompt in prompts))
        if not all(begun) or len(begun) == len(prompts):
            return {}
        place = {prompt: number for number, prompt in enumerate(begun)}
        prefix = self._cache.prefill(begun).select([place[prompt[:-1]] for prompt in prompts])
        return {"past_key_values": prefix.cache}


@contextmanager
def without_own_generation_config(model: nn.Module) -> Iterator[None]:
    """`generate` fills what a given configuration leaves unset from the model's own, a repetition penalty say."""
    generators = _generators(model)
    own = [part.generation_config for part in generators]
    for part in generators:
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for part, config in zip(generators, own, strict=True):
            part.generation_config = config
