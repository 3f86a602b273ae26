"""Run the tutorial from top to bottom and store its outputs, which the documentation shows.

python scripts/notebook.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


def run(path: Path = TUTORIAL) -> nbformat.NotebookNode:
    """The notebook, run in a process and a directory of its own.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as directory:
        client = NotebookClient(
            notebook, timeout=600, record_timing=False, resources={"metadata": {"path": directory}}
        )
        client.execute()
    return notebook


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    nbformat.write(run(), TUTORIAL)
