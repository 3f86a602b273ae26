"""A model, a tokenizer and texts small enough to train a dictionary on within a test."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, LAYERS = 16, 3
WORDS = [f"w{index}" for index in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
)


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; with `bos`, every text begins with <s>."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_model(width: int = WIDTH) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=len(SPECIAL) + len(WORDS),
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def make_texts(count: int = 150) -> list[str]:
    choose = random.Random(0)
    return [" ".join(choose.choices(WORDS, k=choose.randint(5, 30))) for _ in range(count)]


def save_model(directory: Path, width: int = WIDTH) -> Path:
    make_model(width).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory
