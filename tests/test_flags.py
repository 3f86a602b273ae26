"""Flags: what a person writes is read as meant, or refused with a sentence that says where."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.worlds import make_dictionary

from trl_sae_audit import AuditError, Flag, FlagSet
from trl_sae_audit.flags import append_flag


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flags.yaml"


def test_flags_are_saved_and_read_back(path):
    flags = FlagSet(
        [
            Flag(
                "tiny",
                3,
                "sycophancy",
                "agrees with “everything”: always",
                0.5,
                "both",
                identity="ab" * 32,
                audit="/runs/audit",
            ),
            Flag("tiny", 4),
        ]
    )
    flags.save(path)
    assert FlagSet.load(path) == flags
    assert "“everything”" in path.read_text()
    assert len(flags) == 2
    assert flags[1].name == "feature 4"
    assert [flag.weight for flag in flags] == [0.5, 1.0]


def test_a_file_written_by_hand_is_read(path):
    path.write_text("version: 1\nflags:\n  - {dictionary: tiny, feature: 7, label: flattery}\n")
    assert FlagSet.load(path) == FlagSet([Flag("tiny", 7, "flattery")])
    path.write_text("version: 1\nflags:\n")
    assert len(FlagSet.load(path)) == 0


def test_a_flag_is_added_and_comments_stay(path):
    append_flag(path, Flag("tiny", 1, "a"))
    text = path.read_text() + "# looked at by hand\n"
    path.write_text(text)
    append_flag(path, Flag("tiny", 2, "b"))
    assert path.read_text().startswith(text)
    assert [flag.feature for flag in FlagSet.load(path)] == [1, 2]
    with pytest.raises(AuditError, match="already flags feature 2 of"):
        append_flag(path, Flag("tiny", 2))


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nflags:\n    - dictionary: tiny\n      feature: 5\n",
        "flags: [{dictionary: tiny, feature: 5}]\nversion: 1\n",
        "version: 1\nflags: []\n",
    ],
)
def test_a_flag_is_added_to_a_file_of_any_shape(path, text):
    path.write_text(text)
    before = list(FlagSet.load(path))
    append_flag(path, Flag("tiny", 6, "more"))
    assert list(FlagSet.load(path)) == [*before, Flag("tiny", 6, "more")]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{feature: 1}", "Flag 1 in .* no dictionary"),
        ("{dictionary: tiny}", "no feature"),
        ("{dictionary: tiny, feature: -1}", "feature -1"),
        ("{dictionary: tiny, feature: '1'}", "feature '1'"),
        ("{dictionary: tiny, feature: true}", "feature True"),
        ("{dictionary: tiny, feature: 1, weight: 0}", "weight 0"),
        ("{dictionary: tiny, feature: 1, weight: .nan}", "weight nan"),
        ("{dictionary: tiny, feature: 1, weight: .inf}", "weight inf"),
        ("{dictionary: tiny, feature: 1, direction: sideways}", "direction 'sideways'"),
        ("{dictionary: tiny, feature: 1, wieght: 2}", "did you mean 'weight'"),
        ("{dictionary: tiny, feature: 1, label: 3}", "label 3"),
        ("{dictionary: tiny, feature: 1, audit: 3}", "audit 3"),
        ("three", "is a str"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_named(path, entry, words):
    path.write_text(f"version: 1\nflags:\n- {entry}\n")
    with pytest.raises(AuditError, match=words):
        FlagSet.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nflags: [", "not valid YAML"),
        ("- 1", "no list 'flags'"),
        ("flags: []", "version None"),
        ("version: 2\nflags: []", "version 2"),
        ("version: 1\nflags: {a: 1}", "write a list"),
        ("version: 1\nflag: []\nflags: []", "unknown entries"),
        ("version: 1\nflags: [{dictionary: t, feature: 1}, {dictionary: t, feature: 1}]", "flagged twice"),
    ],
)
def test_a_file_that_is_no_flags_is_refused(path, text, words):
    path.write_text(text)
    with pytest.raises(AuditError, match=words):
        FlagSet.load(path)
    with pytest.raises(AuditError, match="cannot be read"):
        FlagSet.load(path.with_name("none.yaml"))


def test_flags_are_checked_against_the_dictionary():
    dictionary = make_dictionary()
    flags = FlagSet([Flag("tiny", 3, identity=dictionary.identity), Flag("other", 5)])
    assert [flag.feature for flag in flags.of(dictionary)] == [3]
    with pytest.raises(AuditError, match="written for another dictionary 'tiny'"):
        FlagSet([Flag("tiny", 3, identity="0" * 64)]).of(dictionary)
    with pytest.raises(AuditError, match="features 0 to 95"):
        FlagSet([Flag("tiny", 96)]).of(dictionary)
    with pytest.raises(AuditError, match="they are of 'other'"):
        FlagSet([Flag("other", 5)]).of(dictionary)
    with pytest.raises(AuditError, match="means nothing in another"):
        Flag("other", 5).check(dictionary)


def test_direction_decides_what_a_flag_objects_to():
    scores = np.array([1.0, -2.0])
    assert list(Flag("t", 1, direction="up").signed(scores)) == [1, -2]
    assert list(Flag("t", 1, direction="down").signed(scores)) == [-1, 2]
    assert list(Flag("t", 1, direction="both").signed(scores)) == [1, 2]


def test_words_are_comments_that_come_back(tmp_path):
    path = tmp_path / "flags.yaml"
    first = Flag(
        "sae", 3, "flattery", reason="- a list?\n- no", words="Great question! · you're \u202e right"
    )
    append_flag(path, first)
    append_flag(path, Flag("sae", 4))
    append_flag(path, Flag("sae", 5, words="# what: a\nline"))
    text = path.read_text(encoding="utf-8")
    assert "\n  # words: Great question! · you're ⟨U+202E⟩ right\n" in text
    loaded = FlagSet.load(path)
    assert [flag.words for flag in loaded] == [
        "Great question! · you're ⟨U+202E⟩ right",
        "",
        "# what: a line",
    ]
    assert loaded == FlagSet([first, Flag("sae", 4), Flag("sae", 5)])
    loaded.save(tmp_path / "again.yaml")
    assert [flag.words for flag in FlagSet.load(tmp_path / "again.yaml")] == [flag.words for flag in loaded]
    FlagSet([]).save(path)
    assert len(FlagSet.load(path)) == 0
    path.write_text("version: 1\nflags: [{dictionary: sae, feature: 3}]\n# words: nobody's\n")
    assert FlagSet.load(path)[0].words == ""
