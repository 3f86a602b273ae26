"""What the package imports is declared, and the lower bounds are the versions that the oldest environment is tested with."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NOT_TESTED = {"torch"}
"""Whose older builds for the CPU are not on the package index."""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported() -> dict[str, str]:
    """Every module that the package imports, here or in a function, by its first name → a file that does."""
    found = {}
    for path in sorted((ROOT / "trl_sae_audit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    return {
        name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "trl_sae_audit"}
    }


def test_what_is_imported_is_declared() -> None:
    """Not left to come with another package, which may drop it."""
    requirements = [
        *project()["dependencies"],
        *chain.from_iterable(project()["optional-dependencies"].values()),
    ]
    declared = {canonicalize_name(Requirement(each).name) for each in requirements}
    belongs_to = packages_distributions()
    missing = {
        name: path
        for name, path in imported().items()
        if not declared & {canonicalize_name(each) for each in belongs_to.get(name, [name])}
    }
    assert not missing


def test_every_bound_is_tested() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    bounds = {}
    for requirement in map(Requirement, project()["dependencies"]):
        (bounds[requirement.name],) = (
            each.version for each in requirement.specifier if each.operator == ">="
        )
    wrong = {
        name: f"{bound} in pyproject.toml, {pins.get(name)} tested"
        for name, bound in bounds.items()
        if name not in NOT_TESTED and Version(bound) != Version(pins.get(name, "0"))
    }
    assert not wrong
