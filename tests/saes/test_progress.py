"""Elsewhere than on a terminal a bar is a line now and then."""

from __future__ import annotations

import pytest

from trl_sae_audit.saes import progress


def test_lines_instead_of_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_SECONDS_A_LINE", 0.0)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress.progress_bar(total=4, desc="Training", unit=" tokens") as bar:
        bar.update(2)
        bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert all("\r" not in line and line.startswith("Training:") for line in lines)
    assert any("50%" in line for line in lines)
    assert "100%" in lines[-1]


def test_what_is_short_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.progress_bar([1, 2, 3], desc="Short")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
