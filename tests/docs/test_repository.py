"""What is committed is the project's own: no link, which would point into the machine that it was made on."""

from __future__ import annotations

import subprocess

import pytest
from helpers.pages import ROOT


def test_no_link_is_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--stage"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(listed) > 100
    assert not [line for line in listed if line.startswith("120000")]
