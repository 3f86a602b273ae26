"""The commands after an audit name a feature of its table, and can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

from trl_sae_audit.cli.audit_next import next_commands
from trl_sae_audit.console import console


def typed(rows: list[dict[str, object]], capsys, certain: set[int], directory: str = "runs/a b") -> list[str]:
    screen = console()
    for line in next_commands(Path(directory), rows, "selection", certain):
        screen.print(line)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "  trl-sae-audit report 'runs/a b'"
    return shlex.split(said[2])[3:]


def row(feature: int, selection: float, words: str = "", **other: object) -> dict[str, object]:
    return {
        "feature": feature,
        "family": 0,
        "selection": selection,
        "words": words,
        "label": "",
        **other,
    }


def test_the_first_that_rises_beyond_chance_is_named_by_its_words(capsys):
    rows = [row(3, 0.5), row(4, -0.4), row(5, 0.3, "you're right · yes; raises sure"), row(6, 0.2, "no")]
    assert typed(rows, capsys, {4, 5, 6}) == ["--feature", "5", "--label", "you're right"]


def test_families_labels_and_what_falls(capsys):
    assert typed([row(3, -0.5, "so", family=2)], capsys, {3}) == (
        ["--family", "2", "--label", "so", "--direction", "down"]
    )
    assert typed([row(3, 0.5, "so", label="flattery")], capsys, {3}) == ["--feature", "3"]
    assert typed([row(3, 0.5)], capsys, {3}) == ["--feature", "3", "--label", "…"]
