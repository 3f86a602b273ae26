"""Break valid files on the spot, in every way there is, and see that each reader says so in one sentence.

Every reader of the package (run records, audits, SAE directories, flags, datasets …) is given a small valid input of which
one file was broken: bits flipped, cut short, pieces repeated, values in JSON, YAML, safetensors headers and Parquet metadata replaced
by hostile ones. What may come of it: the value as it was; another value, where no checksum covers the file; or an AuditError. Anything
else, also a crash of the process or more memory than allowed, is reported. Half of the broken files of a run record get a correct
checksum in the manifest, as somebody who means harm would write it.

    python scripts/fuzz.py --iterations 2000
    python scripts/fuzz.py --reader "run record" --seed 7
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.hostile import READERS
from helpers.hostile.fuzz import OUTCOMES, run
from rich.console import Console
from rich.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reader", nargs="+", choices=list(READERS), help="Only these; default all.")
    parser.add_argument(
        "--iterations", type=int, default=200, help="Of the cheapest readers; others get fewer."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=1.0, help="GiB that a reader may take besides.")
    arguments = parser.parse_args()
    table = Table("reader", *OUTCOMES, title=f"seed {arguments.seed}")
    failures, total = [], 0
    for name in arguments.reader or READERS:
        reader = READERS[name]
        iterations = max(1, arguments.iterations // reader.cost)
        tally = run(name, reader, iterations, arguments.seed, int(arguments.memory * 2**30))
        total += iterations
        table.add_row(name, *(str(tally.counts[outcome]) for outcome in OUTCOMES))
        failures += [
            f"{name}, iteration {iteration}: {detail}" for detail, iteration in tally.failures.items()
        ]
        print(f"{name}: {dict(tally.counts)}", file=sys.stderr, flush=True)
    console = Console(width=110)
    console.print(table)
    console.print(f"{total:,} iterations, {len(failures)} kinds of failure")
    for failure in failures:
        console.print(failure, markup=False, highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
