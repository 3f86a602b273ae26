"""What a label is made from and scored on: contexts of a feature, half of them held out, and contexts in which it is silent."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from ..audit.result import Audit
from ..errors import AuditError
from ..record.reader import RunRecord
from ..saes.words import Context

Source: TypeAlias = Audit | RunRecord
SHOWN, HELD_OUT = 6, 10
"""Contexts of either kind that a label is made from, and that it is scored on, at most."""
_POOL = 4000
"""Contexts of other features, drawn at random, among which the silent ones are looked for."""
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_PLACE = re.compile(r"\S+")


@dataclass(frozen=True)
class Exercise:
    """Contexts to make a feature's label from, and others to score it on.

    Attributes:
        shown: its strongest contexts. near_misses: contexts that share most words with these, in which it is silent.
        held_out: other contexts of it, of other examples than `shown`. silent: contexts drawn at random in which it is silent, a
            word drawn at random as the place.
    """

    feature: int
    shown: list[Context]
    near_misses: list[Context]
    held_out: list[Context]
    silent: list[Context]


def make_exercises(
    source: Source, features: Sequence[int], dictionary: str | None = None, seed: int = 0
) -> list[Exercise]:
    """An exercise for each of some features.

    A context of another feature counts as silent, in an audit, if this one is active nowhere in that answer; a run's record does not
    have that, and there it counts if it is none of the feature's own contexts. A feature that is active nearly everywhere is then
    scored lower than it deserves.

    Args:
        source: an audit or a run's record.
        features: to look at.
        dictionary: name of the run's dictionary, if it has several.
        seed: of what is drawn.

    Raises:
        AuditError: no contexts were kept.
    """
    frame = source.contexts() if isinstance(source, Audit) else source.contexts(None, dictionary)
    if not len(frame):
        raise AuditError(
            f"{source.directory} has no contexts of features, so there is nothing to make or score labels with: audit with "
            "activations, or train with selection recorded."
        )
    frame = _with_keys(frame, isinstance(source, Audit))
    pool = frame.drop_duplicates("text")
    if isinstance(source, Audit):
        pool = pool[pool["row"] >= 0]
        active = source.active_answers(features)
        active["answer"] = _answers(active)
    else:
        active = frame[["feature", "answer"]]
    pool = pool.sample(min(_POOL, len(pool)), random_state=seed).reset_index(drop=True)
    words = [frozenset(_WORD.findall(text.casefold())) for text in pool["text"]]
    counts = Counter(word for each in words for word in each)
    rarity = {word: math.log(len(pool) / count) for word, count in counts.items()}
    return [
        _make_exercise(
            feature,
            frame[frame["feature"] == feature],
            set(active["answer"][active["feature"] == feature]),
            pool,
            words,
            rarity,
            np.random.default_rng([seed, feature]),
        )
        for feature in features
    ]


def _with_keys(frame: pd.DataFrame, of_audit: bool) -> pd.DataFrame:
    """With the whole text, the group that is kept together on one side of the split, and the answer."""
    frame = frame.assign(text=frame["before"] + frame["at"] + frame["after"])
    if not of_audit:
        return frame.assign(
            kind="strongest", group=frame["prompt"] + "\0" + frame["text"], answer=frame["text"]
        )
    group = np.where(frame["row"] >= 0, "row " + frame["row"].astype(str), "prompt " + frame["prompt"])
    return frame.assign(group=group, answer=_answers(frame))


def _answers(frame: pd.DataFrame) -> pd.Series:
    return frame["source"] + " " + frame["row"].astype(str)


def _make_exercise(
    feature: int,
    own: pd.DataFrame,
    active: set[str],
    pool: pd.DataFrame,
    words: Sequence[frozenset[str]],
    rarity: dict[str, float],
    rng: np.random.Generator,
) -> Exercise:
    shown, held_out = _split(own)
    silent = np.flatnonzero(~pool["answer"].isin(active) & ~pool["text"].isin(own["text"]))
    wanted = {word for context in shown for word in _WORD.findall("".join(context).casefold())}
    likeness = np.array(
        [sum(rarity[word] for word in words[place] & wanted) for place in silent.tolist()], float
    )
    near = silent[np.argsort(-likeness, kind="stable")[:SHOWN]]
    rest = np.setdiff1d(silent, near)
    drawn = rng.permutation(rest)[:HELD_OUT]
    marked = (_mark_any(text, rng) for text in pool["text"].iloc[drawn])
    return Exercise(feature, shown, _contexts(pool.iloc[near]), held_out, [each for each in marked if each])


def _split(own: pd.DataFrame) -> tuple[list[Context], list[Context]]:
    """The strongest contexts of every second example, and all others. None of the second shares example or text with the first."""
    if not len(own):
        return [], []
    own = own[np.sign(own["activation"]) == np.sign(own["activation"].iloc[0])]
    strong = own[own["kind"] == "strongest"].drop_duplicates("text")
    strong = strong.iloc[np.argsort(-strong["activation"].abs().to_numpy(), kind="stable")]
    shown_groups = set(list(dict.fromkeys(strong["group"]))[::2][:SHOWN])
    shown = strong[strong["group"].isin(shown_groups)].drop_duplicates("group")
    others = own.drop_duplicates("text")
    others = others[~others["group"].isin(shown_groups) & ~others["text"].isin(shown["text"])]
    drawn_first = others.iloc[np.argsort(others["kind"] == "strongest", kind="stable")]
    return _contexts(shown), _contexts(drawn_first.head(HELD_OUT))


def _contexts(rows: pd.DataFrame) -> list[Context]:
    return list(zip(rows["before"], rows["at"], rows["after"], strict=True))


def _mark_any(text: str, rng: np.random.Generator) -> Context | None:
    """A text with one of its words as the place."""
    spans = [match.span() for match in _PLACE.finditer(text)]
    if not spans:
        return None
    start, end = spans[rng.integers(len(spans))]
    return text[:start], text[start:end], text[end:]


def leading_features(
    source: Source, n: int, dictionary: str | None = None, more: Iterable[int] = ()
) -> list[int]:
    """The features that matter: the first n of the ranking, the watched ones of a run, and some more."""
    if isinstance(source, Audit):
        table, watched = source.ranking(), []
    else:
        table = source.features(dictionary)
        if table["dictionary"].nunique() > 1:
            names = sorted(table["dictionary"].unique())
            raise AuditError(
                f"The record in {source.directory} has several dictionaries: name one of {names}."
            )
        own: dict[str, Any] = source.manifest.get("config", {}).get("watch", {})
        watched = list(own.get(table["dictionary"].iloc[0], {}).values())
    table = table[table["words"] != ""]
    return list(dict.fromkeys([*watched, *more, *(int(feature) for feature in table["feature"].head(n))]))
