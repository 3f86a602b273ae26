"""Parts small enough to train on for hours, or a hundred times over: a random Llama, pairs of random words, directions.

And the configuration of a trainer that does nothing but train.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig

from trl_sae_audit import FeatureDictionary

Parts = tuple[Callable[[], LlamaForCausalLM], PreTrainedTokenizerFast, Dataset, FeatureDictionary]


def tiny_parts(
    *,
    width: int,
    layers: int,
    features: int,
    hook_point: str,
    words: int = 996,
    pairs: int = 256,
    length: tuple[int, int] = (20, 60),
) -> Parts:
    """A function that builds the same model at every call, its tokenizer, preference pairs and a dictionary.

    Args:
        width: d_model; a head has 16 dimensions at least, the MLP three times the width.
        layers: decoder layers.
        features: d_sae of the dictionary, whose directions are random.
        hook_point: where it hooks.
        words: vocabulary, besides four special tokens.
        pairs: rows of the dataset.
        length: least and most tokens of a prompt, and of an answer.
    """
    names = [f"w{i}" for i in range(words)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *names])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    heads = max(1, min(4, width // 16))
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    rng = random.Random(0)
    rows = [
        {
            side: " ".join(rng.choices(names, k=rng.randint(*length))) + " "
            for side in ("prompt", "chosen", "rejected")
        }
        for _ in range(pairs)
    ]
    directions = torch.randn(features, width, generator=torch.Generator().manual_seed(0))

    def build() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    return build, tokenizer, Dataset.from_list(rows), FeatureDictionary(directions, hook_point, "random")


def quiet_config(output_dir: Path, **arguments: Any) -> DPOConfig:
    """TRL's DPO in float32, on a GPU if there is one, without a word; `arguments` come on top."""
    quiet: dict[str, Any] = {
        "output_dir": str(output_dir),
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
    }
    return DPOConfig(**quiet | arguments)
