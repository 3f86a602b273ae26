"""Labels made by a language model, from a feature's strongest contexts against near misses."""

from __future__ import annotations

from collections.abc import Sequence

from ..io.feature_labels import Label, LabelSet
from .chat import Chat
from .exercises import Exercise, Source, leading_features, make_exercises
from .prompts import LABEL_TOKENS, ask_for_label, read_label
from .replies import Cost, KeptReplies

FEATURES = 20
"""Features in front that are labelled by default."""
_LEAST = 2
"""Contexts that a label is made from at least."""


def make_labels(
    source: Source,
    explainer: Chat | KeptReplies,
    features: Sequence[int] | None = None,
    *,
    dictionary: str | None = None,
    seed: int = 0,
) -> LabelSet:
    """Let a language model name features by their contexts in an audit or a run's record.

    It sees up to six of the strongest contexts, and six of those contexts in which the feature is silent that share most words with
    them; the other contexts are left for `score_labels`. Replies are kept, so what was asked before costs nothing.

    ```python
    labels = make_labels(audit, EndpointChat("gpt-5-mini"))
    labels = score_labels(audit, labels, EndpointChat("gpt-5-mini"))
    labels.save(audit.directory)
    ```

    Args:
        source: an audit or a run's record.
        explainer: an `EndpointChat` or a `LocalChat`.
        features: to label; by default the first 20 of the ranking and those that the run watched.
        dictionary: name of the run's dictionary, if it has several.
        seed: of what is drawn.

    Returns:
        Labels, not scored yet, of the features that have two contexts at least.

    Raises:
        AuditError: no contexts were kept; the model cannot be reached.
    """
    if features is None:
        features = leading_features(source, FEATURES, dictionary)
    exercises = make_exercises(source, features, dictionary, seed)
    return label_exercises(known_labels(source, dictionary), exercises, kept(explainer))


def label_exercises(
    labels: LabelSet, exercises: Sequence[Exercise], explainer: KeptReplies, progress: bool = False
) -> LabelSet:
    """An empty set of the same dictionary with a label of each exercise that has enough contexts."""
    asked = _askable(exercises)
    replies = explainer.reply([ask_for_label(each) for each in asked], LABEL_TOKENS, progress)
    chat = explainer.chat
    made = [
        Label(exercise.feature, text, chat.source, chat.name)
        for exercise, reply in zip(asked, replies, strict=True)
        if (text := read_label(reply))
    ]
    return LabelSet(labels.dictionary, labels.identity).updated(made)


def cost_of_labels(exercises: Sequence[Exercise], explainer: KeptReplies) -> Cost:
    """What it would cost to label them."""
    return explainer.cost([ask_for_label(each) for each in _askable(exercises)], LABEL_TOKENS)


def kept(chat: Chat | KeptReplies) -> KeptReplies:
    """A model whose replies are kept."""
    return chat if isinstance(chat, KeptReplies) else KeptReplies(chat)


def known_labels(source: Source, dictionary: str | None = None) -> LabelSet:
    """The labels that an audit or a run's record has of a dictionary."""
    from ..audit.result import Audit

    return source.labels() if isinstance(source, Audit) else source.labels(dictionary)


def _askable(exercises: Sequence[Exercise]) -> list[Exercise]:
    return [each for each in exercises if len(each.shown) >= _LEAST]
