"""Labels in their file, and how they are shown."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from trl_sae_audit import AuditError
from trl_sae_audit.io.feature_labels import (
    FILE,
    Label,
    LabelScore,
    LabelSet,
    caption,
    labels_of,
    read_label_sets,
    with_labels,
)

GOOD, CHANCE = LabelScore(0.84, 0.66, 0.94, 10, 10), LabelScore(0.55, 0.36, 0.72, 10, 9)


def labels() -> LabelSet:
    some = [
        Label(3, "praise", "endpoint", "gpt", "judge", GOOD, CHANCE, words_detection=GOOD),
        Label(5, "a \ud83d half", "neuronpedia", "gemini"),
        Label(7, "nothing", "file", detection=CHANCE),
        Label(8, words_fuzzing=GOOD),
    ]
    return LabelSet("mine", "sha256:1").updated(some)


def test_what_is_saved_is_read_back_and_joined(tmp_path: Path) -> None:
    labels().save(tmp_path, {"source": "endpoint"})
    found = labels_of(tmp_path, "mine", "sha256:1")
    assert found.labels[3] == labels().labels[3]
    assert found.labels[8] == labels().labels[8]
    assert found.text(5) == "a ? half"  # UTF-8 has no halves
    LabelSet("mine", "sha256:1").updated([Label(3, "flattery")]).save(tmp_path)
    LabelSet("other", "sha256:2").updated([Label(3, "dates")]).save(tmp_path)
    sets = read_label_sets(tmp_path)
    assert [sets["sha256:1"].text(feature) for feature in (3, 7)] == ["flattery", "nothing"]
    assert sets["sha256:2"].text(3) == "dates"
    assert len(labels_of(tmp_path, "third", "sha256:3")) == 0
    assert read_label_sets(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "content",
    [
        '{"kind": "labels", "format": 1}',
        '{"kind": "labels", "format": 1, "dictionaries": [{"dictionary": "a", "identity": "b", "labels": [{"feature": -1}]}]}',
        '{"kind": "labels", "format": 1, "dictionaries": [{"dictionary": "a", "identity": "b", "labels": [{"feature": 1, "text": 2}]}]}',
        "[",
    ],
)
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(AuditError, match=r"labels\.json (is damaged|holds something else)"):
        read_label_sets(tmp_path)


def test_captions_say_how_good_a_label_is() -> None:
    frame = pd.DataFrame({"feature": [3, 5, 7, 8, 9], "words": ["Great!", "x", "", "", "y"]})
    with_labels(frame, labels(), ["", "mine", "", "", ""])
    assert list(frame) == ["feature", "label", "label_accuracy", "label_accuracy_low", "words"]
    rows = frame.to_dict("records")
    assert [caption(row) for row in rows] == ["praise (0.84): Great!", "mine: x", "nothing (chance)", "", "y"]
    assert math.isnan(rows[1]["label_accuracy"])
    long = caption(
        {"label": "w" * 90, "label_accuracy": math.nan, "label_accuracy_low": math.nan, "words": "x"}
    )
    assert long == "w" * 59 + "…: x"


def test_scores_are_chance_until_the_interval_is_above() -> None:
    assert [score.is_chance for score in (GOOD, CHANCE)] == [False, True]
    assert str(CHANCE) == "0.55 [0.36, 0.72] chance"
    assert [label.is_chance for label in labels()] == [False, False, True, False]
