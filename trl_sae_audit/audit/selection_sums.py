"""What examples select for, added up by groups of them."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from ..statistics import (
    selection_against_mean,
    selection_squares_against_mean,
    standard_error_of_sum,
)
from .gradients import ExampleArrays


def by_example(arrays: ExampleArrays, values: np.ndarray, d_sae: int) -> sparse.csr_array:
    """Values of active features added up over the answers of each example: [n, d_sae], features in order."""
    n, per_example = arrays.side.shape
    rows = (values.astype(np.float64), arrays.feature, arrays.indptr[::per_example])
    found = sparse.csr_array(rows, shape=(n, d_sae), copy=True)  # adding up sorts the indices in place
    found.sum_duplicates()
    return found


class SelectionSums:
    """`Σ_{i,t} c_{i,t}·(a_f[i,t] − ā_f)` over the examples i of each group, ā_f the mean over the tokens of the group's answers.

    Of a group it is what an audit of its examples alone would say. Four numbers a group and feature are kept, however many examples.

    Args:
        groups: how many.
        d_sae: features.
    """

    def __init__(self, groups: int, d_sae: int) -> None:
        self._d_sae = d_sae
        self._products, self._squares, self._crossed, self._total = np.zeros((4, groups, d_sae))
        self._weight, self._weight_squares, self._tokens, self._examples = np.zeros((4, groups))

    def add(self, arrays: ExampleArrays, group: np.ndarray) -> None:
        """Count examples.

        Args:
            arrays: of n examples.
            group: of each [n].
        """
        products = by_example(arrays, arrays.selected, self._d_sae)
        weights, lengths = arrays.weight.sum(1, dtype=np.float64), arrays.length.reshape(-1)
        activations = arrays.mean * np.repeat(lengths.astype(np.float64), np.diff(arrays.indptr))
        totals = by_example(arrays, activations, self._d_sae)
        for number in np.unique(group):
            of_group = np.flatnonzero(group == number)
            own, weight = products[of_group], weights[of_group]
            self._products[number] += own.sum(0)
            self._squares[number] += own.multiply(own).sum(0)
            self._crossed[number] += own.T @ weight
            self._total[number] += totals[of_group].sum(0)
            self._weight[number] += weight.sum()
            self._weight_squares[number] += np.square(weight).sum()
            self._tokens[number] += arrays.length[of_group].sum()
            self._examples[number] += len(of_group)

    def of(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sum over the examples of some groups together, and that of the examples' squares: [d_sae] each.

        Args:
            groups: numbers of groups, or a mask [groups].
        """
        mean = self._total[groups].sum(0) / max(self._tokens[groups].sum(), 1)
        total = selection_against_mean(self._products[groups].sum(0), self._weight[groups].sum(), mean)
        squares = selection_squares_against_mean(
            self._squares[groups].sum(0),
            self._crossed[groups].sum(0),
            self._weight_squares[groups].sum(),
            mean,
        )
        return total, squares

    def mean_of(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same by example, with its standard error: [d_sae] each; NaN where there are no examples."""
        total, squares = self.of(groups)
        n = int(self._examples[groups].sum())
        if n == 0:
            return np.full(self._d_sae, np.nan), np.full(self._d_sae, np.nan)
        return total / n, standard_error_of_sum(total, squares, n) / n
