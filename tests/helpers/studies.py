"""Running a study on a real model small, on a tiny one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

STUDIES = Path(__file__).parents[2] / "scripts" / "studies"


def letters() -> PreTrainedTokenizerFast:
    """One token a letter."""
    signs = ["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    inner = Tokenizer(WordLevel({sign: place for place, sign in enumerate(signs)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.role[0] }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
    return tokenizer


def run(monkeypatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(STUDIES / f"{script}.py"), *map(str, arguments)])
    importlib.import_module(script).main()


def cells_of(studies: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (studies / "raw" / f"{name}.jsonl").read_text().splitlines()]
