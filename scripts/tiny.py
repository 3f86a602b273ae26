"""Parts small enough to train on for hours, or a hundred times over: a random Llama, pairs of random words, directions.

And the configuration of a trainer that does nothing but train.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig

from trl_sae_audit import FeatureDictionary, load_dictionary
from trl_sae_audit.data.opener import iterate_rows

TINY: dict[str, Any] = {"width": 256, "layers": 4, "features": 4096, "hook_point": "model.layers.2"}
"""What the benchmarks run on without a model of their own."""
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


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that `parts_of` reads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory; a random tiny Llama without it")
    parser.add_argument("--dictionary", "--sae", dest="sae")
    parser.add_argument("--dataset", "--data", dest="data")
    return parser


def parts_of(
    options: argparse.Namespace, pairs: int
) -> tuple[Callable[[], Any], Any, list[dict[str, Any]], FeatureDictionary]:
    """A function that builds the model in float32, its tokenizer, `pairs` rows and the dictionary: those that were given, or a random
    Llama of 4 layers of 256 with its own."""
    if not options.model:
        build, tokenizer, dataset, dictionary = tiny_parts(**TINY, pairs=pairs)
        return build, tokenizer, [dict(row) for row in dataset], dictionary
    columns = [row.columns for row in iterate_rows(options.data) if row.columns is not None]
    rows = [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in columns[:pairs]]
    load = partial(AutoModelForCausalLM.from_pretrained, options.model, dtype="float32")
    return load, AutoTokenizer.from_pretrained(options.model), rows, load_dictionary(options.sae)


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
