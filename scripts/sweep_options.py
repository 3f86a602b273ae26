"""Try every option, model, adapter and subclass of tests/helpers/option_cases.py on a real trainer, against float64 autograd.

    python scripts/sweep_options.py                # all of this environment; prints a table, one line a case as it comes
    python scripts/sweep_options.py packing LoRA   # those whose name has one of these words

Takes one to three seconds of a CPU a case. `docs/reliability.md` has the outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"})
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import datasets
import torch
from helpers.option_cases import CASES
from helpers.options import outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only cases whose name has one of these words")
    parser.add_argument("--start", type=int, default=0, help="leave the first START cases out")
    options = parser.parse_args()
    words = [word.lower() for word in options.words]
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    failed = []
    print("| trainer: option | outcome | s |\n|---|---|---|")
    for case in CASES[options.start :]:
        if words and not any(word in case.name.lower() for word in words):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            try:
                good, said = outcome(case, Path(directory))
            except Exception as error:  # noqa: BLE001 - a sweep goes on, and shows what it met
                good, said = False, f"ERROR {type(error).__name__}: {error}".replace("\n", " ")[:300]
                if words:
                    traceback.print_exc()
        if not good:
            failed.append(case.name)
        print(f"| {case.name} | {said} | {time.monotonic() - began:.1f} |", flush=True)
    print(
        f"\n{len(failed)} not as they should be: {', '.join(failed)}"
        if failed
        else "\nAll as they should be."
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
