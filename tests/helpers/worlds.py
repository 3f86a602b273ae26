"""Tiny real parts for the tests: a word-level tokenizer, small random models, datasets of every layout."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from sae_lens import SAE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
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


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; with `bos`, every text begins with <bos>."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    if bos:
        inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
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


def nudged(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, word: str) -> LlamaForCausalLM:
    """The same model, which prefers a word."""
    after = copy.deepcopy(model)
    number = tokenizer.convert_tokens_to_ids(word)
    with torch.no_grad():
        bias = torch.zeros(len(tokenizer))
        bias[number] = 6.0
    head = after.lm_head
    after.lm_head = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        after.lm_head.weight.copy_(head.weight)
        after.lm_head.bias.copy_(bias)
    return after


def make_reward_model(tokenizer: PreTrainedTokenizerFast, seed: int = 1) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = make_config(tokenizer)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def make_dictionary(seed: int = 2, hook_point: str = HOOK_POINT, name: str = "tiny") -> FeatureDictionary:
    generator = torch.Generator().manual_seed(seed)
    return FeatureDictionary(torch.randn(D_SAE, D_MODEL, generator=generator), hook_point, name)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_sae(directory: Path, seed: int = 0, **metadata: Any) -> None:
    """A TopK SAE of the model's layer, with random weights."""
    torch.manual_seed(seed)
    metadata = {"hook_name": HOOK_POINT, **metadata}
    config = {
        "architecture": "topk",
        "d_in": D_MODEL,
        "d_sae": 64,
        "k": 4,
        "dtype": "float32",
        "device": "cpu",
    }
    SAE.from_dict(config | {"metadata": metadata}).save_model(directory)


def make_sae_dictionary(
    seed: int = 2, hook_point: str = HOOK_POINT, name: str = "tiny", threshold: float = 0.5
) -> FeatureDictionary:
    """One with an encoder: a rectified linear one of random weights, active on about a third of the tokens."""
    import sae_lens

    from trl_sae_audit.saes.encoder import SaeLensEncoder

    metadata = sae_lens.saes.sae.SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    with torch.random.fork_rng(devices=[]):
        sae = sae_lens.SAE.from_dict(
            sae_lens.StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata).to_dict()
        )
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / D_MODEL**0.5
    sae.b_enc.data -= threshold
    return FeatureDictionary(sae.W_dec.data, hook_point, name, encoder=SaeLensEncoder(sae))


def words(rng: random.Random, shortest: int, longest: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, longest)))


def pairs(n: int, seed: int = 0, *, padded: bool = True) -> Dataset:
    rng = random.Random(seed)
    low = 2 if padded else 6
    return Dataset.from_list(
        [
            {
                "prompt": words(rng, low, 6) + " ",
                "chosen": words(rng, low, 6),
                "rejected": words(rng, low, 6),
            }
            for _ in range(n)
        ]
    )


def triples(n: int, seed: int = 0) -> Dataset:
    """Pairs with a third answer, TPO's `reference`."""
    rng = random.Random(seed + 1)
    return pairs(n, seed).map(lambda _: {"reference": words(rng, 2, 6)})


def prompts(n: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list([{"prompt": words(rng, 2, 6)} for _ in range(n)])


def labelled(n: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {"prompt": words(rng, 2, 6) + " ", "completion": words(rng, 2, 6), "label": i % 3 != 0}
            for i in range(n)
        ]
    )


def texts(n: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list([{"text": words(rng, 4, 12)} for _ in range(n)])


def reward_by_length(completions: list[str], **kwargs: object) -> list[float]:
    """A reward that differs within every group: sum of the words' numbers."""
    return [sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) / 100.0 for text in completions]
