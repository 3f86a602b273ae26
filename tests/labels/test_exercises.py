"""What a label is made from and scored on, against the activations of every answer of the audit."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.audits import audited
from helpers.worlds import make_dictionary, pairs

from trl_sae_audit import Audit, AuditError
from trl_sae_audit.labels.exercises import Exercise, leading_features, make_exercises


def texts(contexts: list[tuple[str, str, str]]) -> set[str]:
    return {"".join(context) for context in contexts}


@pytest.fixture(scope="module")
def exercises(made: Path) -> list[Exercise]:
    audit = Audit.load(made)
    return make_exercises(audit, leading_features(audit, 30))


def test_shown_and_held_out_contexts_are_of_other_rows(audit: Audit, exercises: list[Exercise]) -> None:
    checked = 0
    for exercise in exercises:
        own = audit.contexts([exercise.feature])
        rows = dict(zip(own["before"] + own["at"] + own["after"], own["row"], strict=True))
        shown, held_out = (
            {rows[text] for text in texts(part)} for part in (exercise.shown, exercise.held_out)
        )
        assert not shown & held_out
        assert not texts(exercise.shown) & texts(exercise.held_out)
        strongest = own.iloc[0]
        assert exercise.shown[0] == (strongest["before"], strongest["at"], strongest["after"])
        checked += len(exercise.held_out) >= 5
    assert checked >= 5


def test_silent_contexts_are_of_answers_without_the_feature(audit: Audit, exercises: list[Exercise]) -> None:
    every = audit.contexts()
    answers = dict(
        zip(
            every["before"] + every["at"] + every["after"],
            zip(every["row"], every["source"], strict=True),
            strict=True,
        )
    )
    for exercise in exercises:
        table = audit.examples([exercise.feature])
        active = set(
            zip(*(table[table["max_activation"] != 0][name] for name in ("row", "side")), strict=True)
        )
        silent = [*exercise.near_misses, *exercise.silent]
        assert len(silent) == 16
        assert not {answers[text] for text in texts(silent)} & active
        assert not texts(exercise.near_misses) & texts(exercise.silent)


def test_near_misses_share_more_words_than_what_is_drawn(exercises: list[Exercise]) -> None:
    def shared(exercise: Exercise, part: list[tuple[str, str, str]]) -> float:
        wanted = {word for text in texts(exercise.shown) for word in text.split()} - {"<eos>"}
        return sum(len(wanted & set(text.split())) for text in texts(part)) / len(part)

    near, drawn = (
        sum(shared(each, part(each)) for each in exercises)
        for part in (lambda e: e.near_misses, lambda e: e.silent)
    )
    assert near > 2 * drawn


def test_places_of_silent_contexts_are_drawn_words(exercises: list[Exercise]) -> None:
    for exercise in exercises:
        for before, at, after in exercise.silent:
            assert at.strip() == at
            assert at
            assert f"{before}|{at}|{after}".replace("|", "") == before + at + after
    again = [each.silent for each in exercises]
    assert any(context[0] for silent in again for context in silent)


def test_an_audit_without_contexts_is_refused(model, tokenizer, tmp_path: Path) -> None:
    audit = audited(
        model, tokenizer, pairs(6), make_dictionary(), output_dir=tmp_path / "a", activations=False
    )
    with pytest.raises(
        AuditError, match="has no contexts of features, so there is nothing to make or score labels with"
    ):
        make_exercises(audit, [0])
