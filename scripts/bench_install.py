"""What an installation weighs: the files of the package's requirements and of each extra, in MB, in this environment.

    python scripts/bench_install.py

Read from what pip noted when it installed them. An extra's weight is what it adds to the requirements; a package that is not installed
here counts as nothing and is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN = "trl-sae-audit"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    known: dict[str, Distribution] = {
        str(canonicalize_name(each.metadata["Name"])): each for each in distributions()
    }
    own = [Requirement(each) for each in distribution(OWN).requires or []]
    needed = [each for each in own if each.marker is None]
    base = closure(needed, known)
    lenses = base - closure([each for each in needed if each.name != "sae-lens"], known)
    rows: list[tuple[str, set[str], list[str]]] = [
        ("trl-sae-audit", base, []),
        ("of this torch", {"torch"}, []),
        ("of this sae-lens, and what only it needs", lenses, []),
    ]
    for extra in sorted(distribution(OWN).metadata.get_all("Provides-Extra") or []):
        asked = [each for each in own if each.marker is not None and each.marker.evaluate({"extra": extra})]
        absent = [each.name for each in asked if canonicalize_name(each.name) not in known]
        rows.append((f"+ [{extra}]", closure(asked, known) - base, absent))
    print("| installed | packages | MB |\n|---|---|---|")
    for what, names, absent in rows:
        size = sum(megabytes(known[name]) for name in names)
        missing = f" (not here: {', '.join(absent)})" if absent else ""
        print(f"| {what}{missing} | {len(names)} | {size:,.0f} |")


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


if __name__ == "__main__":
    main()
