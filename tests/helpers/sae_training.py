"""A model and texts small enough to train a dictionary on within a test."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from helpers.worlds import WORDS, make_config, make_tokenizer, save_model
from trl_sae_audit.saes.training_config import TrainSAEConfig

WIDTH = 16
HOOK = "blocks.1.hook_resid_post"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
)


def make_narrow_model(width: int = WIDTH) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = make_config(
        make_tokenizer(),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def save_narrow_model(directory: Path) -> None:
    save_model(make_narrow_model(), make_tokenizer(bos=True), directory)


def make_texts(count: int = 150) -> list[str]:
    choose = random.Random(0)
    return [" ".join(choose.choices(WORDS, k=choose.randint(5, 30))) for _ in range(count)]


def training_config(output: Path, **changes: Any) -> TrainSAEConfig:
    settings: dict[str, Any] = {
        "hook_point": HOOK,
        "output_dir": str(output),
        "d_sae": 64,
        "k": 6,
        "training_tokens": 250 * 256,
        "sae_batch_size": 256,
        "held_out_share": 0.2,
        "seed": 3,
    }
    return TrainSAEConfig(**{**settings, **changes})
