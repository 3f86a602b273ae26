"""Tiny real parts for the tests: a word-level tokenizer, small random models, datasets of every layout."""

from __future__ import annotations

import random
from typing import Any, TypeVar

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trl_sae_audit import FeatureDictionary

Model = TypeVar("Model", bound=PreTrainedModel)

WORDS = [f"w{i}" for i in range(60)]
D_MODEL, N_LAYERS, D_SAE = 32, 3, 96
HOOK_POINT = "model.layers.1"


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return tokenizer


def make_config(
    tokenizer: PreTrainedTokenizerFast, kind: type[PretrainedConfig] = LlamaConfig, **more: Any
) -> Any:
    """The configuration of a tiny decoder, a Llama unless `kind` says otherwise."""
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return kind(**size | more)


def made(model: type[Model], config: PretrainedConfig, seed: int) -> Model:
    """A model with random weights, far from the linear regime of a fresh one."""
    torch.manual_seed(seed)
    built = model(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return built


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    return made(LlamaForCausalLM, make_config(tokenizer), seed)


def make_reward_model(tokenizer: PreTrainedTokenizerFast, seed: int = 1) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = make_config(tokenizer)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def make_dictionary(seed: int = 2, hook_point: str = HOOK_POINT, name: str = "tiny") -> FeatureDictionary:
    generator = torch.Generator().manual_seed(seed)
    return FeatureDictionary(torch.randn(D_SAE, D_MODEL, generator=generator), hook_point, name)


def _text(rng: random.Random, shortest: int, longest: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, longest)))


def pairs(n: int, seed: int = 0, *, padded: bool = True) -> Dataset:
    rng = random.Random(seed)
    low = 2 if padded else 6
    return Dataset.from_list(
        [
            {
                "prompt": _text(rng, low, 6) + " ",
                "chosen": _text(rng, low, 6),
                "rejected": _text(rng, low, 6),
            }
            for _ in range(n)
        ]
    )


def prompts(n: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list([{"prompt": _text(rng, 2, 6)} for _ in range(n)])


def labelled(n: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {"prompt": _text(rng, 2, 6) + " ", "completion": _text(rng, 2, 6), "label": i % 3 != 0}
            for i in range(n)
        ]
    )


def texts(n: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list([{"text": _text(rng, 4, 12)} for _ in range(n)])


def reward_by_length(completions: list[str], **kwargs: object) -> list[float]:
    """A reward that differs within every group: sum of the words' numbers."""
    return [sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) / 100.0 for text in completions]
