"""How long an audit will take is told before it begins."""

from __future__ import annotations

import pytest
from helpers.worlds import pairs

from trl_sae_audit import LookaheadConfig, audit_preferences
from trl_sae_audit.audit.duration import Duration, span
from trl_sae_audit.models.sampling import Sampling

pytestmark = pytest.mark.newest


def test_it_is_said_once_with_what_takes_it(model, tokenizer, dictionary, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_sae_audit.audit.duration._SHORT", 0)
    config = LookaheadConfig(prompts=2, pairs=12, sampling=Sampling(3, 8))
    arguments = (model, tokenizer, pairs(20), dictionary)
    options = {"lookahead": config, "output_dir": tmp_path / "audit"}
    before = audit_preferences(*arguments, progress=False, lookahead=config).features()
    assert "will take" not in capsys.readouterr().err
    audit = audit_preferences(*arguments, **options)
    said = capsys.readouterr().err
    assert "This audit will take about" in said
    for part in (
        "the gradient of 10 examples",
        "10 more",
        "sampling 6 answers",
        "derivatives along the step",
    ):
        assert part in said
    assert audit.features().equals(before)  # what was tried out leaves no trace
    audit_preferences(*arguments, **options)
    assert "will take" not in capsys.readouterr().err


def test_it_reads_like_a_sentence():
    assert str(Duration({"this": 1.2, "that": 3.0})) == "This audit will take less than 5 s."
    assert str(Duration({"this": 42.2, "that": 7000.0})) == (
        "This audit will take about 2.0 h: 42 s this, 1.9 h that."
    )
    long = Duration({"this": 1800.0}, plain=700.0, a_row=9.0)
    assert str(long).endswith(
        ": 30 min this. A first look takes less: about 12 min without the lookahead (--no_lookahead), or 10 min on 66 rows (--max_rows 66)."
    )
    assert str(Duration({"this": 1800.0}, plain=700.0, a_row=90.0)).endswith("(--no_lookahead).")
    assert [span(value) for value in (0.2, 89, 91, 5399, 5401)] == [
        "less than 1 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
    ]
