"""Answers to one prompt are one example of the statistics: their advantages share a mean, so they are not independent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import numpy as np

from .gradients import ExampleArrays
from .store import Part

_SCALED = ("gradient", "weight", "selected", "activation_attribution")
"""What enters the statistics' means over examples; scaled so that they stay means over answers."""
_OF_ANSWERS = ("gradient", "side", "length", "log_prob", "weight", "residual")
_OF_FEATURES = ("feature", "mean", "max_activation", "activation_attribution", "selected")


def by_prompt(parts: Iterable[Part], groups: np.ndarray) -> Part:
    """All parts as one, whose examples are prompts with all their answers.

    Args:
        parts: of single answers, in order.
        groups: number of the prompt of each row of the data [rows].

    Returns:
        Prompts in the order of their first answers; where some have fewer answers than others, empty ones of no side, length 0 and no
        gradient take the missing places.
    """
    joined, rows = _join(list(parts))
    _, first, unit = np.unique(groups[rows], return_index=True, return_inverse=True)
    unit = np.argsort(np.argsort(first))[unit]
    counts = np.bincount(unit)
    order = np.full((len(counts), counts.max()), -1)
    places = np.argsort(unit, kind="stable")
    order[np.arange(order.shape[1]) < counts[:, None]] = places
    arrays = _taken(joined, order)
    factor = np.float32(len(counts) / len(rows))
    for name in _SCALED:
        arrays[name] = arrays[name] * factor
    empty = {field.name: np.zeros(0, np.int32) for field in fields(ExampleArrays)}
    merged = ExampleArrays(**(empty | arrays))
    return Part(rows[np.sort(first)], np.zeros((0, 32), np.uint8), [], merged, {})


def _join(parts: list[Part]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    joined = {
        name: np.concatenate([getattr(part.arrays, name) for part in parts])
        for name in (*_OF_ANSWERS, *_OF_FEATURES)
    }
    joined["active"] = np.concatenate([np.diff(part.arrays.indptr) for part in parts])
    return joined, np.concatenate([part.row for part in parts])


def _taken(joined: dict[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """The answers of `order` [units, answers], which are one a row of `joined`; nothing where it is −1."""
    found = {}
    for name in _OF_ANSWERS:
        values = joined[name][:, 0][order]
        values[order < 0] = 0
        found[name] = values
    active = np.where(order < 0, 0, joined["active"][order]).reshape(-1)
    starts = np.concatenate([[0], np.cumsum(joined["active"])[:-1]])[order.reshape(-1)]
    indptr = np.concatenate([[0], np.cumsum(active)])
    places = np.repeat(starts - indptr[:-1], active) + np.arange(indptr[-1])
    found["indptr"] = indptr
    return found | {name: joined[name][places] for name in _OF_FEATURES}
