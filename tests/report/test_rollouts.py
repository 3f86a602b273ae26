"""Answers before and after, side by side: paired by prompt, marked where features are active, those first that changed most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.html_page import Page
from helpers.report_sources import HOSTILE, make_dictionary, make_record

from trl_sae_audit import AuditError, RunRecord
from trl_sae_audit.record.rollouts import (
    ACTIVATIONS,
    AFTER,
    BEFORE,
    ROLLOUTS,
    TOKENS,
    Rollout,
    read_rollouts,
    rollout_tables,
)
from trl_sae_audit.record.writer import RecordWriter
from trl_sae_audit.report import write_report
from trl_sae_audit.report.rollouts import build_reader
from trl_sae_audit.report.sources import open_source


def rollout(
    when: str, step: int, prompt: str, text: str, feature: int = 3, at: dict[int, float] | None = None
) -> Rollout:
    pieces = tuple(text.split("|"))
    at = at or {}
    counts = np.array([int(place in at) for place in range(len(pieces))])
    return Rollout(
        when, step, prompt, pieces, {"tiny": (counts, np.full(len(at), feature), np.array(list(at.values())))}
    )


ANSWERS = [
    rollout(BEFORE, 1, "a?", "no| way", at={0: 1.0}),
    rollout(BEFORE, 1, "b?", "well"),
    rollout(BEFORE, 2, "c?", "hm", at={0: 0.3}),
    rollout(AFTER, 48, "b?", "you| are| right", at={1: 4.0, 2: 2.0}),
    rollout(AFTER, 48, "a?", "no| way", at={0: 1.2}),
    rollout(AFTER, 47, "d?", "you", feature=9, at={0: 3.0}),
]


def with_rollouts(directory: Path, answers: list[Rollout]) -> Path:
    """The record with a table of rollouts in it, all as a run writes it."""
    record = RunRecord.load(directory)
    header = {name: record.manifest[name] for name in ("trainer", "model", "sides", "dictionaries", "config")}
    writer = RecordWriter.create(directory.with_name("with"), header)
    for step in (12, 48):  # the later one counts
        for table, columns in rollout_tables(answers if step == 48 else answers[:1], step):
            writer.append(table, columns)
    writer.close("finished", 48, {"tiny": record.totals()})
    return directory.with_name("with")


def test_rollouts_come_back_as_they_were(tmp_path: Path) -> None:
    record = RunRecord.load(with_rollouts(make_record(tmp_path / "run", make_dictionary()), ANSWERS))
    found = read_rollouts(*(record.table(name) for name in (ROLLOUTS, TOKENS, ACTIVATIONS)))
    assert [(each.when, each.sampled, each.prompt, each.pieces) for each in found] == [
        (each.when, each.sampled, each.prompt, each.pieces) for each in ANSWERS
    ]
    for one, other in zip(found, ANSWERS, strict=True):
        for mine, theirs in zip(one.active.get("tiny", ()), other.active["tiny"], strict=False):
            np.testing.assert_allclose(mine, theirs)


def test_pairs_are_of_one_prompt_and_the_largest_change_is_first(tmp_path: Path) -> None:
    source = open_source(with_rollouts(make_record(tmp_path / "run", make_dictionary()), ANSWERS))
    reader = build_reader(source.views[0], source.rollouts)
    assert reader is not None
    assert reader.features[0] == 3
    told = [
        (pair.before and pair.before.prompt, pair.after and pair.after.prompt, pair.same)
        for pair in reader.pairs
    ]
    assert told[:2] == [("b?", "b?", True), ("a?", "a?", True)]
    assert not any(same for *_, same in told[2:])
    assert reader.pairs[0].change == pytest.approx((4 + 2) / 4 / 3)
    assert reader.pairs[1].change == pytest.approx((1.2 - 1.0) / 4 / 2)
    after = reader.pairs[0].after
    assert after is not None
    assert [(piece.text, piece.shown, piece.level) for piece in after.pieces] == [
        ("you ", -1, 0.0),
        ("are", 0, 1.0),
        (" ", -1, 0.0),
        ("right", 0, 0.5),
    ]
    assert build_reader(source.views[0], source.rollouts[:3]) is None, "nothing after"


def test_the_page_shows_them_as_text(tmp_path: Path) -> None:
    hostile = HOSTILE.replace("\ud800", "")
    answers = [rollout(BEFORE, 1, hostile, "x"), rollout(AFTER, 48, hostile, f"{hostile}|y", at={0: 1.0})]
    page = Page(write_report(with_rollouts(make_record(tmp_path / "run", make_dictionary()), answers)))
    assert "What it writes, before and after" in page.text
    assert "after, step 48 · more of what is marked" in " ".join(page.text.split())
    assert ("mark", {"class": "hit-0", "style": "--level:38%"}) in page.tags
    assert len(page.scripts) == 2
    assert "\u202e" not in page.source


def test_damage_ends_in_a_sentence(tmp_path: Path) -> None:
    tables = {name: pd.DataFrame(columns) for name, columns in rollout_tables(ANSWERS, 3)}
    tables[ACTIVATIONS].loc[0, "place"] = 99
    with pytest.raises(ValueError, match="none of its tokens"):
        read_rollouts(*tables.values())
    directory = make_record(tmp_path / "run", make_dictionary())
    record = RunRecord.load(directory)
    writer = RecordWriter.create(tmp_path / "bad", {"dictionaries": record.dictionaries})
    for table, columns in rollout_tables(ANSWERS, 3):
        writer.append(table, {name: values for name, values in columns.items() if name != "prompt"})
    writer.close("finished", 48, {"tiny": record.totals()})
    with pytest.raises(AuditError, match="no column 'prompt'"):
        open_source(tmp_path / "bad")
