"""Which features are active at the tokens of answers: the pairs of token and feature, without a matrix of all features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..models.attention_sinks import silent_tokens
from ..models.hook_points import HookPoint
from ..models.response_states import PrefixCachedReader, Row
from .dictionary import FeatureDictionary

Active = tuple[np.ndarray, np.ndarray, np.ndarray]
"""How many features are active at each token, which, and their activations."""
_ROWS = 16  # answers in a forward pass
_ANY_LENGTH = 2**31


def answer_reader(point: HookPoint) -> PrefixCachedReader:
    """Reads answers of any length; those to one prompt after one reading of it."""
    return PrefixCachedReader(point, _ROWS, _ANY_LENGTH)


@torch.no_grad()
def read_active(
    point: HookPoint, dictionary: FeatureDictionary, rows: Sequence[Row], *, attention_sinks: bool = False
) -> Iterator[tuple[int, Active]]:
    """Number of each row and the features that are active at its answer's tokens, in an order of the reader's own.

    At an attention sink (a token of more than ten times the median norm of its answer's) no feature counts as active.

    Args:
        point: where the dictionary reads, its model in any mode.
        dictionary: on the model's device.
        rows: token ids of prompt and answer.
        attention_sinks: count features as active there too.
    """
    for states in answer_reader(point).read(rows, first=True):
        answers = states.of_response.to(states.hidden.device)
        silent = silent_tokens(states.hidden, answers, attention_sinks=attention_sinks)
        active = find_active(dictionary, states.hidden[answers], silent[answers])
        ends = np.cumsum([len(rows[place][1]) for place in states.rows])
        yield from zip(states.rows, _split(active, ends), strict=True)


def find_active(dictionary: FeatureDictionary, tokens: Tensor, silent: Tensor) -> Active:
    """The features that are active at tokens [n, d_model], none where `silent` [n]."""
    parts = []
    width = dictionary.tokens_at_once
    for part, none in zip(tokens.split(width), silent.split(width), strict=True):
        activations = dictionary.encode(part, none)
        counts = (activations != 0).sum(1)
        places = activations.nonzero(as_tuple=True)
        parts.append((counts, places[1], activations[places]))
    counts, features, values = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return counts.int().numpy(), features.int().numpy(), values.float().numpy()


def _split(active: Active, ends: np.ndarray) -> Iterator[Active]:
    """The same, divided where the tokens of each row end."""
    counts, features, values = active
    bounds = np.concatenate([[0], np.cumsum(counts)])
    for start, stop in itertools.pairwise([0, *ends.tolist()]):
        part = slice(bounds[start], bounds[stop])
        yield counts[start:stop], features[part], values[part]
