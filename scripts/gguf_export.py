"""A model from a GGUF file as a plain Hugging Face model directory, in float32.

Loaded straight from GGUF, a model calls itself quantized and refuses to be trained or saved. This dequantizes it once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def export_gguf(gguf: Path, directory: str | Path) -> Path:
    """Save the model of a GGUF file and its tokenizer in `directory`, dequantized, in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
