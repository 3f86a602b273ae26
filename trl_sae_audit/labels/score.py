"""Scores of labels: does a label tell, on contexts that it was not made from, where its feature is active?

*Detection*: a judge reads a context and the label, and says whether the label fits something in it; half of the contexts are the
feature's, in the others it is silent. *Fuzzing*: the same with one place marked, the token at which the feature is most active or a word
drawn at random in a context without it, and the question whether the label fits that place (Paulo et al. 2024, delphi). Both are
summed up as balanced accuracy. A reply that is neither yes nor no is not counted as no, but left out (as in PrefScope).

The line of words needs no judge: it fits a context if one of its phrases occurs in it, and a place if the phrase covers it. It is made
again from the shown contexts alone, so that it too is scored on contexts that it does not come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..io.feature_labels import Label, LabelScore, LabelSet
from ..saes.words import Context, words_of
from ..statistics import balanced_accuracy
from .chat import Chat
from .exercises import Exercise, Source, leading_features, make_exercises
from .make import FEATURES, kept
from .prompts import VERDICT_TOKENS, Messages, ask_detection, ask_fuzzing, read_verdict
from .replies import Cost, KeptReplies

LEAST = 5
"""Contexts of either kind that must be judged for there to be a score."""
_QUESTIONS: dict[str, Callable[[str, Context], Messages]] = {
    "detection": ask_detection,
    "fuzzing": ask_fuzzing,
}
_PIECE = re.compile(r"<\|?[\w/]+\|?>|[^\W_]+(?:['’\-][^\W_]+)*|[^\w\s]|_+")


def score_labels(
    source: Source,
    labels: LabelSet,
    judge: Chat | KeptReplies | None = None,
    features: Sequence[int] | None = None,
    *,
    dictionary: str | None = None,
    seed: int = 0,
) -> LabelSet:
    """Score labels and lines of words on contexts that they were not made from.

    Args:
        source: the audit or the run's record that has the contexts.
        labels: from `make_labels` or `fetch_labels`.
        judge: an `EndpointChat` or a `LocalChat`; without one only the lines of words are scored, which costs nothing.
        features: to score; by default the first 20 of the ranking and those that the run watched.
        dictionary: name of the run's dictionary, if it has several.
        seed: as in `make_labels`, so that shown and held-out contexts are the same.

    Returns:
        The labels with what is known: no score where fewer than five contexts of either kind could be judged.

    Raises:
        AuditError: no contexts were kept; the judge cannot be reached.
    """
    if features is None:
        features = leading_features(source, FEATURES, dictionary)
    exercises = make_exercises(source, features, dictionary, seed)
    return score_exercises(labels, exercises, None if judge is None else kept(judge))


def score_exercises(
    labels: LabelSet, exercises: Sequence[Exercise], judge: KeptReplies | None, progress: bool = False
) -> LabelSet:
    """The labels with the scores of these exercises."""
    found = {each.feature: labels.labels.get(each.feature, Label(each.feature)) for each in exercises}
    for exercise in exercises:
        found[exercise.feature] = _with_words(found[exercise.feature], exercise)
    if judge is not None:
        asked = list(_questions(labels, exercises))
        replies = judge.reply([messages for *_, messages in asked], VERDICT_TOKENS, progress)
        verdicts: dict[tuple[int, str], list[tuple[bool, bool | None]]] = {}
        for (feature, kind, is_active, _), reply in zip(asked, replies, strict=True):
            verdicts.setdefault((feature, kind), []).append((is_active, read_verdict(reply)))
        for feature in dict.fromkeys(feature for feature, _ in verdicts):
            found[feature] = replace(
                found[feature],
                judge=judge.chat.name,
                detection=score_verdicts(verdicts[feature, "detection"]),
                fuzzing=score_verdicts(verdicts[feature, "fuzzing"]),
            )
    return labels.updated(
        label for label in found.values() if label.text or label.words_detection or label.words_fuzzing
    )


def cost_of_scores(labels: LabelSet | None, exercises: Sequence[Exercise], judge: KeptReplies) -> Cost:
    """What it would cost to score them; where the labels are not made yet, with some of usual length."""
    if labels is None:
        labels = LabelSet("", "").updated(Label(each.feature, " ".join(["word"] * 10)) for each in exercises)
    return judge.cost([messages for *_, messages in _questions(labels, exercises)], VERDICT_TOKENS)


def score_verdicts(verdicts: Sequence[tuple[bool, bool | None]]) -> LabelScore | None:
    """The score of (is the feature active there, was it said to be) pairs; None where too few of either kind were answered."""
    active, silent = (
        [said for is_active, said in verdicts if said is not None and is_active == kind]
        for kind in (True, False)
    )
    if min(len(active), len(silent)) < LEAST:
        return None
    found = balanced_accuracy(sum(active), len(active), len(silent) - sum(silent), len(silent))
    return LabelScore(found.estimate, found.low, found.high, len(active), len(silent))


def phrase_occurs(words: str, context: Context, at_place: bool = False) -> bool:
    """Whether a phrase of a line of words occurs in a context, as whole words in any case; or whether one covers its place."""
    before, at, after = context
    text = before + at + after
    pieces = [(match[0].casefold(), match.span()) for match in _PIECE.finditer(text)]
    inner = at.strip()
    start = len(before) + (at.index(inner) if inner else 0)
    end = start + max(len(inner), 1)
    for phrase in words.split(" · "):
        wanted = [match[0].casefold() for match in _PIECE.finditer(phrase)]
        for first in range(len(pieces) - len(wanted) + 1) if wanted else ():
            if [piece for piece, _ in pieces[first : first + len(wanted)]] == wanted:
                begins, ends = pieces[first][1][0], pieces[first + len(wanted) - 1][1][1]
                if not at_place or (begins < end and start < ends):
                    return True
    return False


def _with_words(label: Label, exercise: Exercise) -> Label:
    words = words_of(exercise.shown)
    scores = []
    for at_place in (False, True):
        verdicts: list[tuple[bool, bool | None]] = [
            (is_active, phrase_occurs(words, context, at_place)) for is_active, context in _judged(exercise)
        ]
        scores.append(score_verdicts(verdicts) if words else None)
    return replace(label, words_detection=scores[0], words_fuzzing=scores[1])


def _questions(labels: LabelSet, exercises: Sequence[Exercise]) -> Iterator[tuple[int, str, bool, Messages]]:
    for exercise in exercises:
        text = labels.text(exercise.feature)
        for kind, ask in _QUESTIONS.items() if text else ():
            for is_active, context in _judged(exercise):
                yield exercise.feature, kind, is_active, ask(text, context)


def _judged(exercise: Exercise) -> list[tuple[bool, Context]]:
    return [*((True, each) for each in exercise.held_out), *((False, each) for each in exercise.silent)]
