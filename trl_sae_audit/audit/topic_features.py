"""Features by topic: in which topics is a feature preferred otherwise than elsewhere?

An example *prefers* a feature whose mean activation is larger in its preferred answers than in the others, whatever the answers'
lengths and however much larger. Of a topic and a feature, a cell, four counts say all: in how many examples the feature was preferred
and in how many the opposite, in the topic and elsewhere. If the topic had nothing to do with it, the first of them would be a draw
without replacement, so Fisher's exact test holds for rare features too. Memory: counts and sums of the cells, whatever the data.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from ..statistics import benjamini_hochberg
from .gradients import ExampleArrays
from .selection_sums import SelectionSums, by_example
from .store import Part

LEAST = 10
"""Examples that prefer or disprefer a feature, in a topic and elsewhere each, for a cell to be tested."""
CELL_COLUMNS = (
    "topic",
    "feature",
    "preference",
    "preference_elsewhere",
    "interaction",
    "examples",
    "examples_elsewhere",
    "selection",
    "selection_standard_error",
    "selection_elsewhere",
    "selection_elsewhere_standard_error",
    "p_value",
    "q_value",
)
_TIE = 1e-4
"""A difference of activations below this share of them is rounding."""


class TopicFeatures:
    """Running counts over the parts of an audit.

    Args:
        topics: how many.
        d_sae: features.
        by_weight: take the sides from the answers' weights, as where a reward model is audited, and not from the labels.
    """

    def __init__(self, topics: int, d_sae: int, by_weight: bool = False) -> None:
        self.topics, self._d_sae, self._by_weight = topics, d_sae, by_weight
        groups = topics + 1  # the last is of examples without a topic
        self._won, self._lost = np.zeros((2, groups, d_sae), np.int32)
        self._selection = SelectionSums(groups, d_sae)

    def add(self, part: Part, topic: np.ndarray) -> None:
        """Count the examples of a part.

        Args:
            part: of n examples.
            topic: of each, -1 for none [n].
        """
        arrays, group = part.arrays, np.where(topic < 0, self.topics, topic)
        sides = np.sign(arrays.weight) if self._by_weight else arrays.side
        example, feature, sign = preferences(arrays, sides, self._d_sae)
        cell = group[example] * self._d_sae + feature
        for counts, which in ((self._won, sign > 0), (self._lost, sign < 0)):
            counts += np.bincount(cell[which], minlength=counts.size).reshape(counts.shape).astype(np.int32)
        self._selection.add(arrays, group)

    def frame(self) -> pd.DataFrame:
        """The cells that can be tested, see `Audit.topic_features`; the clearest first."""
        won, lost = self._won[: self.topics], self._lost[: self.topics]
        p_value = interaction_p(won, lost, self._won.sum(0) - won, self._lost.sum(0) - lost)
        topic, feature = np.nonzero(np.isfinite(p_value))
        won_here, lost_here = won[topic, feature], lost[topic, feature]
        won_there = self._won.sum(0)[feature] - won_here
        lost_there = self._lost.sum(0)[feature] - lost_here
        here, there = won_here / (won_here + lost_here), won_there / (won_there + lost_there)
        selections = np.zeros((4, len(topic)))
        for number in np.unique(topic):
            own = np.arange(self.topics + 1) == number
            which = topic == number
            sums = (*self._selection.mean_of(own), *self._selection.mean_of(~own))
            for values, column in zip(selections, sums, strict=True):
                values[which] = column[feature[which]]
        p = p_value[topic, feature]
        examples = ((won_here + lost_here).astype(np.int64), (won_there + lost_there).astype(np.int64))
        columns = (
            *(topic + 1, feature, here, there, here - there),
            *(*examples, *selections, p, benjamini_hochberg(p)),
        )
        frame = pd.DataFrame(dict(zip(CELL_COLUMNS, columns, strict=True)))
        order = np.lexsort((-frame["interaction"].abs(), frame["p_value"]))
        return frame.iloc[order].reset_index(drop=True)


def topic_features(
    parts: Iterable[Part], of_rows: np.ndarray, topics: int, d_sae: int, by_weight: bool = False
) -> pd.DataFrame:
    """The cells of all parts; `of_rows` is the topic of each row of the data."""
    found = TopicFeatures(topics, d_sae, by_weight)
    for part in parts:
        if len(part.row):
            found.add(part, of_rows[part.row].astype(np.int64))
    return found.frame()


def preferences(
    arrays: ExampleArrays, sides: np.ndarray, d_sae: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which features each example prefers: example, feature and sign (+1 preferred, -1 the opposite, 0 no difference), where active.

    Args:
        arrays: of n examples with R answers each.
        sides: above 0 of the answers of one side, below 0 of the other [n, R]; an example without answers of both prefers nothing.
        d_sae: features.
    """
    ahead, behind = (sides > 0).sum(1, keepdims=True), (sides < 0).sum(1, keepdims=True)
    both = (ahead > 0) & (behind > 0)
    share = (sides > 0) / np.maximum(ahead, 1) - (sides < 0) / np.maximum(behind, 1)
    values = arrays.mean * np.repeat((share * both).reshape(-1), np.diff(arrays.indptr))
    difference, size = (by_example(arrays, each, d_sae) for each in (values, np.abs(values)))
    sign = np.where(np.abs(difference.data) > _TIE * size.data, np.sign(difference.data), 0)
    example = np.repeat(np.arange(len(sides)), np.diff(difference.indptr))
    return example, difference.indices, sign


def interaction_p(
    won: np.ndarray, lost: np.ndarray, won_elsewhere: np.ndarray, lost_elsewhere: np.ndarray
) -> np.ndarray:
    """Fisher's exact test of the same preference in a topic as elsewhere, two-sided: twice the smaller tail.

    Returns:
        p [topics, features], NaN of a cell with fewer than `LEAST` examples that differ, here or elsewhere.
    """
    here, there = won + lost, won_elsewhere + lost_elsewhere
    known = (here >= LEAST) & (there >= LEAST)
    p_value = np.full(won.shape, np.nan)
    population = (here + there)[known], (won + won_elsewhere)[known], here[known]
    fewer = stats.hypergeom.cdf(won[known], *population)
    more = stats.hypergeom.sf(won[known] - 1, *population)
    p_value[known] = np.minimum(1.0, 2 * np.minimum(fewer, more))
    return p_value
