"""Responses read after their prompts' keys and values, against whole rows read alone, in models that remember differently."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers.worlds import make_dictionary, make_model, make_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from trl_sae_audit import FeatureScorer
from trl_sae_audit.models.hook_points import HookPoint, resolve_hook_point
from trl_sae_audit.models.response_states import PrefixCachedReader, Row

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
SIZED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
WINDOW = 4  # shorter than most prompts below
CONFIGS: dict[str, tuple[PreTrainedConfig, str]] = {
    "llama": (LlamaConfig(**SIZED), "model.layers.1"),
    "learned positions": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "transformer.h.1",
    ),
    "positions from the mask": (
        OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
        "model.decoder.layers.1",
    ),
    "sliding window": (MistralConfig(**SIZED, sliding_window=WINDOW), "model.layers.1"),
    "alternating windows": (
        Gemma3TextConfig(**SIZED, head_dim=8, sliding_window=WINDOW, sliding_window_pattern=2),
        "model.layers.1",
    ),
    "no position ids": (
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4),
        "transformer.h.1",
    ),
    "a state": (
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4),
        "backbone.layers.1",
    ),
}
READ_WHOLE = {"no position ids", "a state"}


def rows(seed: int = 0) -> list[Row]:
    """Groups of one, three and four to prompts of 1 to 11 tokens, shuffled, with an empty response and an empty prompt."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 64, (length,), generator=generator).tolist())

    made = [
        (prompt, text(length))
        for prompt, lengths in [
            (text(11), [3, 1, 7]),
            (text(1), [2, 9, 4, 4]),
            (text(6), [5]),
            (text(4), [6, 0, 2]),
            ((), [3, 5]),
        ]
        for length in lengths
    ]
    order = torch.randperm(len(made), generator=generator).tolist()
    return [made[index] for index in order]


def alone(point: HookPoint, row: Row) -> Tensor:
    """Hidden states of the response's tokens, but never the row's first: the whole row by itself, through the whole decoder."""
    seen: list[Tensor] = []
    handle = point.module.register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        point.decoder(torch.tensor([row[0] + row[1]]))
    handle.remove()
    return seen[0][0, max(1, len(row[0])) :]


def make(kind: str) -> tuple[PreTrainedModel, HookPoint]:
    torch.manual_seed(0)
    config, path = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that attention is not nearly uniform
    return model, resolve_hook_point(model, path)


def tokens_read(reader: PrefixCachedReader, asked: list[Row]) -> tuple[int, dict[int, Tensor]]:
    """How many tokens, padding included, the first layer saw; and each row's hidden states."""
    seen: list[int] = []
    handle = reader.point.decoder.get_input_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].numel())
    )
    found = {}
    for reading in reader.read(asked):
        for place, index in enumerate(reading.rows):
            assert index not in found
            found[index] = reading.hidden[place][reading.of_response[place]]
    handle.remove()
    return sum(seen), found


@pytest.mark.parametrize("batch_size", [2, 16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_read_is_the_whole_row_read_alone(kind: str, batch_size: int) -> None:
    _, point = make(kind)
    reader = PrefixCachedReader(point, batch_size, max_length=64)
    asked = rows()
    _, found = tokens_read(reader, asked)
    assert sorted(found) == list(range(len(asked)))
    for index, row in enumerate(asked):
        if row[0] + row[1]:
            close = 1e-2 if kind == "a state" else 1e-4  # its scan rounds otherwise at another length
            torch.testing.assert_close(found[index], alone(point, row), rtol=close, atol=close)
    assert reader._caches == (kind not in READ_WHOLE)


def test_a_prompt_is_read_once() -> None:
    _, point = make("llama")
    reader = PrefixCachedReader(point, 16, max_length=64)
    prompt = tuple(range(4, 34))
    asked = [(prompt, (index, index + 1)) for index in range(40, 48)]
    tokens_read(reader, asked)  # compares first
    assert tokens_read(reader, asked)[0] == 30 + 8 * 2


def test_rows_that_are_too_long_lose_their_beginning() -> None:
    _, point = make("llama")
    asked = [(tuple(range(4, 24)), tuple(range(30, 30 + length))) for length in (2, 4, 9)]
    _, found = tokens_read(PrefixCachedReader(point, 16, max_length=24), asked)
    cut = (asked[2][0][5:], asked[2][1])
    for index, row in enumerate([*asked[:2], cut]):
        torch.testing.assert_close(found[index], alone(point, row), rtol=1e-4, atol=1e-4)


def test_a_model_that_reads_otherwise_is_given_whole_rows(caplog: pytest.LogCaptureFixture) -> None:
    _, point = make("learned positions")

    class Careless(type(point.decoder)):  # type: ignore[misc]
        """Counts positions from the row's begin, padding included."""

        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: Any = None,
        ) -> Any:
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )

    point.decoder.__class__ = Careless
    reader = PrefixCachedReader(point, 16, max_length=64)
    with caplog.at_level(logging.INFO):
        _, found = tokens_read(reader, rows())
    assert "prompts are read once a response" in caplog.text
    for index, row in enumerate(rows()):
        if row[0] + row[1]:
            torch.testing.assert_close(found[index], alone(point, row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_a_group_are_those_of_its_answers_alone(dtype: torch.dtype) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).to(dtype)
    prompts = ["w1 w2 w3 "] * 4 + ["w4 w5 "] * 3
    answers = [f"w{7 + index} w{20 + 3 * index} w9" for index in range(7)]
    together = FeatureScorer(model, tokenizer, make_dictionary()).score(prompts, answers, [3, 50])
    one_by_one = [
        FeatureScorer(model, tokenizer, make_dictionary()).score([prompt], [answer], [3, 50])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    rough = dtype == torch.bfloat16
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-4, atol=0.5 if rough else 1e-4)
