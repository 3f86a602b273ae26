"""Audits of sets of pairs that were never audited as such, composed of the pairs of others.

Where the policy is its own reference, each pair's gradient, activations and weight are its own, and every statistic of an audit but the
lookahead is made of sums over pairs. So pairs can be taken from several audits of one model: the numbers are those that an audit of
the composed set would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pandas as pd

from trl_sae_audit import Audit
from trl_sae_audit.audit.gradients import ExampleArrays
from trl_sae_audit.audit.statistics import ResamplingConfig, feature_statistics
from trl_sae_audit.audit.store import AuditStore, Part
from trl_sae_audit.saes.dictionary import FeatureDictionary

Example = tuple[ExampleArrays, int]
"""An audited pair: the arrays it is in, and its place there."""

_OF_PAIRS = ("gradient", "side", "length", "log_prob", "weight", "residual")
_OF_FEATURES = ("feature", "mean", "max_activation", "activation_attribution", "selected")
_FEW = ResamplingConfig(n_flips=2, n_halves=2)
"""The sign-flip test of the attribution and the split halves are not looked at here."""


def examples_of(audit: Audit) -> dict[int, Example]:
    """The pairs of an audit by their rows in its data."""
    parts = AuditStore.open(audit.directory).parts()
    return {int(row): (part.arrays, place) for part in parts for place, row in enumerate(part.row)}


def compose(examples: Sequence[Example], flipped: Sequence[bool] | None = None) -> Part:
    """The examples as a part of an audit; those that are `flipped` with chosen and rejected exchanged."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*_OF_PAIRS, *_OF_FEATURES)}
    counts = []
    for number, (arrays, place) in enumerate(examples):
        sign = -1 if flipped is not None and flipped[number] else 1
        for name in _OF_PAIRS:
            value = getattr(arrays, name)[place : place + 1]
            found[name].append(value * sign if name in ("gradient", "side", "weight") else value)
        first, last = 2 * place, 2 * place + 2
        inside = slice(arrays.indptr[first], arrays.indptr[last])
        for name in _OF_FEATURES:
            value = getattr(arrays, name)[inside]
            found[name].append(value * sign if name in ("activation_attribution", "selected") else value)
        counts.append(np.diff(arrays.indptr[first : last + 1]))
    joined = {name: np.concatenate(values) for name, values in found.items()}
    joined["side"] = joined["side"].astype(np.int8)
    joined["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    empty = {field.name: np.zeros(0, np.int32) for field in fields(ExampleArrays)}
    return Part(
        np.arange(len(examples)), np.zeros((0, 32), np.uint8), [], ExampleArrays(**(empty | joined)), {}
    )


def features_of(part: Part, dictionary: FeatureDictionary) -> pd.DataFrame:
    """The table of features of a composed set, in the order of the features."""
    return feature_statistics(lambda: [part], dictionary, len(part.row), _FEW)
