"""The scripts say by themselves what they need (PEP 723), so that `uv run scripts/dpo.py` makes their environment."""

from __future__ import annotations

import re
import tomllib

import pytest
from helpers.pages import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

HEADER = re.compile(
    r"\A# /// script\n((?:#(?: .*)?\n)+?)# ///\n"
)  # the expression of PEP 723, of a first block
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.newest
@pytest.mark.parametrize("name", ["dpo", "grpo", "ppo"])
def test_a_script_needs_this_project_from_this_directory(name: str) -> None:
    found = HEADER.match((ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8"))
    assert found is not None
    header = tomllib.loads("\n".join(line[2:] for line in found[1].splitlines()))
    (needed,) = map(Requirement, header["dependencies"])
    assert needed.name == PROJECT["name"]
    assert needed.extras == ({"ppo"} if name == "ppo" else set())
    assert needed.extras <= set(PROJECT["optional-dependencies"])
    assert SpecifierSet(header["requires-python"]) == SpecifierSet(PROJECT["requires-python"])
    source = header["tool"]["uv"]["sources"][needed.name]["path"]
    assert (ROOT / "scripts" / source / "pyproject.toml").resolve() == (ROOT / "pyproject.toml").resolve()
