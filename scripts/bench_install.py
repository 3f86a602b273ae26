"""What an installation weighs and how long its imports take, in this environment.

    python scripts/bench_install.py

The files of the package, of its requirements and of each extra, in MB, are read from what pip noted when it installed them. An extra's
weight is what it adds to the requirements; a package that is not installed here counts as nothing and is named. An import is timed in
processes of its own, by the processor time that it takes after the imports before it; the median of several rounds, and in brackets the
shortest and the longest.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trl_sae_audit

OWN = "trl-sae-audit"
_TRAINER = "from trl import DPOConfig, DPOTrainer"
_CALLBACK = "from trl_sae_audit import FeatureAttributionCallback"
IMPORTS: dict[str, tuple[str, str]] = {
    "`import trl_sae_audit`": ("", "import trl_sae_audit"),
    "`trl-sae-audit --help`": ("", "from trl_sae_audit.cli.main import main; main(['--help'])"),
    "`from trl_sae_audit import FlagSet`": ("", "from trl_sae_audit import FlagSet"),
    "`import trl`": ("", "import trl"),
    f"`{_TRAINER}`": ("", _TRAINER),
    f"`{_CALLBACK}` after `import trl`": ("import trl", _CALLBACK),
    f"`{_CALLBACK}` after `{_TRAINER}`": (_TRAINER, _CALLBACK),
    "`from trl_sae_audit import audit_preferences, load_dictionary`": (
        "",
        "from trl_sae_audit import audit_preferences, load_dictionary",
    ),
}
"""What is timed → the imports before it, and the program."""
ROUNDS = 5
_ALONE = "trl-sae-audit alone"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="in each, every import is timed once")
    rounds = parser.parse_args().rounds
    known: dict[str, Distribution] = {
        str(canonicalize_name(each.metadata["Name"])): each for each in distributions()
    }
    own = [Requirement(each) for each in distribution(OWN).requires or []]
    needed = [each for each in own if each.marker is None]
    base = closure(needed, known)
    lenses = base - closure([each for each in needed if each.name != "sae-lens"], known)
    rows: list[tuple[str, set[str], list[str]]] = [
        (_ALONE, set(), []),
        ("… with all that it requires", base, []),
        ("of this torch", {"torch"}, []),
        ("of this sae-lens, and what only it needs", lenses, []),
    ]
    for extra in sorted(distribution(OWN).metadata.get_all("Provides-Extra") or []):
        asked = [each for each in own if each.marker is not None and each.marker.evaluate({"extra": extra})]
        absent = [each.name for each in asked if canonicalize_name(each.name) not in known]
        rows.append((f"+ [{extra}]", closure(asked, known) - base, absent))
    print("| installed | packages | MB |\n|---|---|---|")
    for what, names, absent in rows:
        size = own_megabytes() if what == _ALONE else sum(megabytes(known[name]) for name in names)
        missing = f" (not here: {', '.join(absent)})" if absent else ""
        print(
            f"| {what}{missing} | {1 if what == _ALONE else len(names)} | {size:,.{0 if size > 10 else 1}f} |"
        )
    print("\n| import | seconds of processor time |\n|---|---|")
    taken: dict[str, list[float]] = {what: [] for what in IMPORTS}
    for _ in range(rounds):
        for what, programs in IMPORTS.items():
            taken[what].append(seconds(*programs))
    for what, times in taken.items():
        print(f"| {what} | {statistics.median(times):.2f} [{min(times):.2f}, {max(times):.2f}] |")


def closure(asked: Iterable[Requirement], known: dict[str, Distribution]) -> set[str]:
    """Names of what some requirements need, with all that those need."""
    found: set[tuple[str, str]] = set()
    waiting = list(asked)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in requirement.extras | {""}:
            if (name, extra) in found or name not in known:
                continue
            found.add((name, extra))
            for each in map(Requirement, known[name].requires or []):
                if each.marker is None or each.marker.evaluate({"extra": extra}):
                    waiting.append(each)
    return {name for name, _ in found}


def megabytes(installed: Distribution) -> float:
    return sum(file.size or 0 for file in installed.files or []) / 1e6


def own_megabytes() -> float:
    """Of the package's own files, compiled ones left out, also where it is installed as editable."""
    root = Path(trl_sae_audit.__file__).parent
    return (
        sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc") / 1e6
    )


def seconds(before: str, program: str) -> float:
    """Processor time of a program in a Python of its own that has run `before`."""
    timed = f"import sys, time\n{before}\nbegin = time.process_time()\n{program}\nsys.exit(str(time.process_time() - begin))"
    done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=False)
    return float(done.stderr.splitlines()[-1])


if __name__ == "__main__":
    main()
