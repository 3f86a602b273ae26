"""Kill, starve and disturb real trainings, and compare what they leave with a training that nothing happened to.

Every training is a process of its own, forked from this one, which has imported everything and trained nothing: a DPO
trainer on a tiny model, with the attribution callback, a checkpoint every few steps and a record written at every step.
Each fault prints one line: what was done, how often, and what came of it; the command fails if anything is not as it
must be.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.scenarios.clocks import clock, train_under_jumping_clock
from helpers.scenarios.directories import directories, two_runs
from helpers.scenarios.disks import disks
from helpers.scenarios.kills import kills
from helpers.scenarios.processes import dead_rank
from helpers.scenarios.trainings import Bench, Result
from rich.console import Console
from rich.table import Table

FAULTS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "disks": disks,
    "directories": directories,
    "two-runs": two_runs,
    "dead-rank": dead_rank,
    "clock": clock,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", nargs="+", choices=["kills", *FAULTS, "all", "under-jumping-clock"])
    parser.add_argument("--times", type=int, default=60, help="deaths in `kills`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of `kills`")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fault == ["under-jumping-clock"]:
        train_under_jumping_clock(options.directory)
        return
    faults: dict[str, Callable[[Bench], Iterator[Result]]] = {
        "kills": lambda bench: kills(bench, options.times, options.seed),
        **FAULTS,
    }
    chosen = list(faults) if "all" in options.fault else options.fault
    table = Table("what", "times", "result")
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        for name in chosen:
            for what, times, result in faults[name](bench):
                table.add_row(what, str(times), result)
                print(f"| {what} | {times} | {result} |", flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
