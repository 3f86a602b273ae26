"""The pages of which pictures are made: an output as a terminal shows it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_page_shows_colours_and_wraps_where_a_terminal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from pictures import THEMES, page

    shown, height = page({"try <x>": f"\x1b[32mgood\x1b[0m\n{'a' * 100}"}, 80, THEMES["dark"])
    assert "try &lt;x&gt;" in shown
    assert f"{'a' * 80}\n{'a' * 20}" in shown
    assert "color: #" in shown.partition("good")[0][-60:]
    assert height == 40 + 16 * (shown.count("\n") + 4)
    sys.modules.pop("pictures")
