"""Outcomes beside a record: what is written is read, and what cannot be meant is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trl_sae_audit import AuditError
from trl_sae_audit.outcomes import FILE, Outcome, read_outcomes, write_outcomes


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_outcomes(tmp_path) == []
    rate = Outcome("agrees", 0.4, 0.3, 0.5, 100, "agrees with the user", "before", "down", "share")
    path = write_outcomes(
        tmp_path, [rate, {"measure": "reward", "estimate": np.float32(1.5), "n": np.int64(7)}]
    )
    assert path == tmp_path / FILE
    assert read_outcomes(tmp_path) == [rate, Outcome("reward", 1.5, n=7)]
    assert rate.text() == "40%"
    assert read_outcomes(tmp_path)[1].name == "reward"
    write_outcomes(tmp_path, [])
    assert read_outcomes(tmp_path) == []


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"estimate": 1}, "no measure"),
        ({"measure": "m"}, "no estimate"),
        ({"measure": " ", "estimate": 1}, "short name"),
        ({"measure": "m", "estimate": float("nan")}, "finite"),
        ({"measure": "m", "estimate": True}, "finite"),
        ({"measure": "m", "estimate": "1"}, "finite"),
        ({"measure": "m", "estimate": 1, "low": 0}, "one end"),
        ({"measure": "m", "estimate": 0.5, "low": 0.1, "high": 0.1}, "not distances"),
        ({"measure": "m", "estimate": 1, "n": -1}, "count"),
        ({"measure": "m", "estimate": 1, "stage": "during"}, "'before', 'after'"),
        ({"measure": "m", "estimate": 1, "wanted": "more"}, "'up', 'down'"),
        ({"measure": "m", "estimate": 1, "unit": "%"}, "'share'"),
        ({"measure": "m", "estimate": 1, "lo": 0}, "it takes"),
        (3, "mapping"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, entry: object, sentence: str) -> None:
    with pytest.raises(AuditError, match=sentence):
        write_outcomes(tmp_path, [entry])  # type: ignore[list-item]
    assert read_outcomes(tmp_path) == []


def test_twice_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="twice"):
        write_outcomes(tmp_path, [Outcome("m", 1), Outcome("m", 2)])
    write_outcomes(tmp_path, [Outcome("m", 1), Outcome("m", 2, stage="before")])
    for content in (
        "{",
        "[]",
        json.dumps({"kind": "outcomes", "format": 9}),
        json.dumps({"kind": "outcomes", "format": 1}),
        '{"kind": "outcomes", "format": 1, "outcomes": [1]}',
    ):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(AuditError, match=FILE):
            read_outcomes(tmp_path)
    with pytest.raises(AuditError, match="could not be written"):
        write_outcomes(tmp_path / "missing", [])
