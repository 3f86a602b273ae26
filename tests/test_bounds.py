"""The lower bounds in pyproject.toml are the versions that the oldest environment is tested with."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NOT_TESTED = {"torch"}
"""Whose older builds for the CPU are not on the package index."""


def test_every_bound_is_tested() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {}
    for requirement in map(Requirement, project["dependencies"]):
        (bounds[requirement.name],) = (
            each.version for each in requirement.specifier if each.operator == ">="
        )
    wrong = {
        name: f"{bound} in pyproject.toml, {pins.get(name)} tested"
        for name, bound in bounds.items()
        if name not in NOT_TESTED and Version(bound) != Version(pins.get(name, "0"))
    }
    assert not wrong
