"""Decides by rule what a feature is about, from where it is active: a stand-in for the person who reads the evidence.

It uses only what any user has: texts, activations and an audit's table. No label of an answer and no ground truth.
"""

from __future__ import annotations

from collections import Counter

from ..audit.result import Audit
from ..callbacks.probe import Probe
from ..flags import Flag, FlagSet
from ..models.hook_points import resolve_hook_point
from ..models.residual_stream import hidden_states
from ..saes.dictionary import FeatureDictionary
from .wording import words
from .world import World

SUBJECTS = {
    "agrees": ("agree", "disagree"),
    "padded": ("filler",),
    "marked": ("mark",),
    "right": ("value",),
}
"""Behaviour → the kinds of span (see `parsing.Span`) in which its features are active."""
OPPOSITES = {"disagree": "disagrees"}
"""Of these kinds the ones that are a behaviour's opposite, and what a feature of it is called."""
TOP = 20
"""Number of features of a ranking, and of places of each feature, that are looked at."""
MAJORITY = 0.5
"""Minimum share of a feature's strongest places that lie in words of what it is said to be about."""


class FeatureReader:
    """Where each feature of a dictionary is most active, in held-out answers of the plain language.

    Args:
        world: the lab's world.
        dictionary: of its model.
        n: held-out pairs whose prompts and chosen answers are read. Nothing is planted in them.
    """

    def __init__(self, world: World, dictionary: FeatureDictionary, n: int = 300) -> None:
        held_out = world.preferences({}, n, seed=1, split="heldout", beliefs=(True, False, None))
        prompts, answers = list(held_out["prompt"]), list(held_out["chosen"])
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        batch = Probe.from_texts(texts, world.tokenizer).batch
        hidden = hidden_states(resolve_hook_point(world.model(), dictionary.hook_names), batch)
        active = dictionary.encode(hidden) * batch["attention_mask"][..., None]
        active[:, 0] = 0
        self._active = active.flatten(0, 1)
        self._words = [world.tokenizer.convert_ids_to_tokens(row.tolist()) for row in batch["input_ids"]]
        self._starts = [1 + len(words(prompt)) for prompt in prompts]
        self._spans = [world.language.spans(answer) for answer in answers]

    def places(self, feature: int, n: int = TOP) -> list[tuple[int, int]]:
        """(text, token) of the feature's `n` largest activations, or fewer if it is active less often; largest first."""
        strongest = self._active[:, feature].topk(n)
        flat = [
            place
            for value, place in zip(*map(list, (strongest.values, strongest.indices)), strict=True)
            if value > 0
        ]
        return [divmod(int(place), len(self._words[0])) for place in flat]

    def contexts(self, feature: int, n: int = 2) -> list[str]:
        """The feature's strongest tokens, each with the two before it, without repetitions."""
        contexts = [
            " ".join(self._words[row][max(1, at - 2) : at + 1]) for row, at in self.places(feature, 200)
        ]
        return list(dict.fromkeys(contexts))[:n]

    def about(self, feature: int) -> dict[str, float]:
        """Kind of span → share of the feature's strongest places that lie in one."""
        places = self.places(feature)
        kinds = Counter(kind for row, at in places for kind in self._kinds(row, at))
        return {kind: count / len(places) for kind, count in kinds.items()}

    def speaks_of(self, feature: int, behaviour: str) -> bool:
        """Whether the majority of its strongest places lie in words of a behaviour, or of its opposite."""
        about = self.about(feature)
        return sum(about.get(kind, 0.0) for kind in SUBJECTS[behaviour]) >= MAJORITY

    def name_of(self, feature: int, behaviour: str) -> str:
        """The behaviour, or its opposite where most of the feature's strongest places in its words lie in that."""
        about = self.about(feature)
        kind = max(SUBJECTS[behaviour], key=lambda each: about.get(each, 0.0))
        return OPPOSITES.get(kind, behaviour)

    def _kinds(self, row: int, at: int) -> set[str]:
        here = at - self._starts[row]
        return {span.kind for span in self._spans[row] if span.start <= here < span.stop}


def find_flags(audit: Audit, reader: FeatureReader, behaviour: str, by: str, top: int = TOP) -> FlagSet:
    """The features a user would flag: high in the audit's ranking, and active in words of the behaviour.

    Args:
        audit: of the preferences.
        reader: of its dictionary.
        behaviour: what should not be taught.
        by: the column to rank by, largest |value| first; its sign is the flag's direction.
        top: how many features are looked at.
    """
    table = audit.features()
    table = table.reindex(table[by].abs().sort_values(ascending=False, kind="stable").index).head(top)
    return FlagSet(
        [
            Flag(
                audit.dictionary.name,
                int(row["feature"]),
                label=f"{reader.name_of(int(row['feature']), behaviour)} {row['feature']}",
                reason=f"{by} {row[by]:+.3g}; active in “{'”, “'.join(reader.contexts(int(row['feature'])))}”",
                direction="up" if row[by] > 0 else "down",
                identity=audit.dictionary.identity,
                words=str(row["words"]),
            )
            for row in table.to_dict("records")
            if reader.speaks_of(int(row["feature"]), behaviour)
        ]
    )
