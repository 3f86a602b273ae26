"""Statistics of every feature over the examples of an audit, in one reading of its parts.

An example's contribution to feature f is `c_if = -⟨G_i, d_f⟩`: linear in `G_i`. So whatever is a weighted sum over
examples (totals, flipped totals, half totals, products with length) is summed over gradients first, [d_model] numbers
each, and projected onto the features once. Memory does not depend on the number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats

from ..saes.dictionary import DictionaryChunk, FeatureDictionary
from ..statistics import (
    benjamini_hochberg,
    standard_error_of_sum,
    two_sided_normal_p,
)
from .selection_sums import SelectionSums
from .store import Part

RADEMACHER = 1 / (4 * stats.norm.sf(math.sqrt(2)))
"""3.178…, the smallest k with `P(|Σ s_i c_i| ≥ x) ≤ k · P(|N(0, Σc²)| ≥ x)` for random signs s, whatever c and x
(Bentkus & Dzindzalieta 2015, Bernoulli 21:1231). It gives p-values below the `1 / (1 + flips)` that drawing reaches."""

_AT_ONCE = 16384  # rows beside which the dictionary is read 2,048 features at a time


@dataclass(frozen=True)
class ResamplingConfig:
    """How much to draw.

    Attributes:
        n_flips: random sign flips; all of them are enumerated where there are no more.
        n_halves: random splits for the split-half agreement.
        seed: of both.
    """

    n_flips: int = 9999
    n_halves: int = 200
    seed: int = 0


class FeatureStatistics:
    """Running sums over the parts of an audit.

    Args:
        dictionary: on the CPU.
        n_examples: in the whole audit.
        settings: see `ResamplingConfig`.
    """

    def __init__(
        self, dictionary: FeatureDictionary, n_examples: int, settings: ResamplingConfig | None = None
    ) -> None:
        self.settings = settings or ResamplingConfig()
        self.dictionary = dictionary
        self.n = n_examples
        d_sae, d_model = dictionary.d_sae, dictionary.d_model
        self._signs = _FlipSigns(n_examples, self.settings)
        self._sums = {name: np.zeros(d_model) for name in ("all", "positive", "negative", "times_length")}
        self._residuals = {side: np.zeros(d_model) for side in (1, -1)}
        self._answers = dict.fromkeys((1, -1), 0)
        self._flipped = _SignedSums(len(self._signs), n_examples, d_model)
        self._halved = _SignedSums(self.settings.n_halves, n_examples, d_model)
        self._halves = _halves(n_examples, self.settings)
        self._squares, self._sizes = np.zeros(d_sae), np.zeros(d_sae)
        self._length, self._length_squared = 0.0, 0.0
        self._seen = 0
        self._activity = _Activity(d_sae)

    def add(self, part: Part) -> None:
        """Count the examples of a part, in the order of the audit."""
        arrays = part.arrays
        if not len(part.row):
            return
        gradient = arrays.gradient.astype(np.float64)
        example = gradient.sum(1)
        which = slice(self._seen, self._seen + len(part.row))
        self._seen = which.stop
        length = length_contrast(arrays.length, arrays.side)
        self._sums["all"] += example.sum(0)
        self._sums["positive"] += gradient[arrays.side > 0].sum(0)
        self._sums["negative"] += gradient[arrays.side < 0].sum(0)
        self._sums["times_length"] += length @ example
        for side in self._residuals:
            self._residuals[side] += arrays.residual[arrays.side == side].astype(np.float64).sum(0)
            self._answers[side] += int((arrays.side == side).sum())
        self._length += length.sum()
        self._length_squared += (length**2).sum()
        rows = torch.from_numpy(example.astype(np.float32))
        self._flipped.add(self._signs.of(which), rows)
        self._halved.add(torch.from_numpy(self._halves[:, which].astype(np.float32)), rows)
        for chunk in self.dictionary.chunks(_AT_ONCE):
            contribution = chunk.project(rows).double().numpy()
            self._squares[chunk.features] += (contribution**2).sum(0)
            self._sizes[chunk.features] += np.abs(contribution).sum(0)
        self._activity.add(part)

    def frame(self) -> pd.DataFrame:
        """One row a feature, in the order of the dictionary; `Audit.features` says what the columns are."""
        n = self.n
        total = self._project(self._sums["all"])
        norm = float(np.linalg.norm(self._sums["all"]))
        cosine = total / norm if norm > 0 else np.zeros_like(total)
        p_value = self._sign_flip_p(total)
        table = {
            "feature": np.arange(len(total)),
            "attribution": total / n,
            "positive": self._project(self._sums["positive"]) / n,
            "negative": self._project(self._sums["negative"]) / n,
            "standard_error": standard_error_of_sum(total, self._squares, n) / n,
            "p_value": p_value,
            "q_value": benjamini_hochberg(p_value),
            "cosine": cosine,
            "share": cosine**2,
            "lift": cosine**2 * self.dictionary.d_model,
            "effective_examples": _ratio(self._sizes**2, self._squares),
            "split_half_agreement": self._split_half_agreement(total),
            "projection_difference": self._projection_difference(),
        }
        return pd.DataFrame(table | self._length_columns(total) | self._activity.columns(n))

    def _projection_difference(self) -> np.ndarray:
        """Mean residual of the answers of one side less that of the other's, along each direction."""
        if not all(self._answers.values()):
            return np.full(self.dictionary.d_sae, np.nan)
        means = {side: total / self._answers[side] for side, total in self._residuals.items()}
        return self._project(means[-1] - means[1])

    def _project(self, gradient: np.ndarray) -> np.ndarray:
        vector, found = torch.from_numpy(-gradient), np.empty(self.dictionary.d_sae)
        for chunk in self.dictionary.chunks(_AT_ONCE):
            found[chunk.features] = chunk.project(vector).numpy()
        return found

    def _reached(self, drawn: _SignedSums, threshold: np.ndarray) -> np.ndarray:
        """How many of the drawn sums are at least `threshold` in size, by feature."""
        counts = np.zeros(len(threshold))
        for chunk in self.dictionary.chunks(_AT_ONCE):
            size = drawn.along(chunk).abs_()
            least = torch.from_numpy(threshold[chunk.features]).float()
            # torch takes longer to count booleans than to make the sums
            counts[chunk.features] = (size >= least).numpy().sum(0)
        return counts

    def _sign_flip_p(self, total: np.ndarray) -> np.ndarray:
        deviation = np.sqrt(self._squares)
        reached = self._reached(self._flipped, np.abs(total) - 1e-5 * deviation)
        if self._signs.exact:
            return reached / len(self._signs)
        drawn = (1 + reached) / (1 + len(self._signs))
        return np.minimum(drawn, sign_flip_bound(total, self._squares))

    def _split_half_agreement(self, total: np.ndarray) -> np.ndarray:
        if self.n < 2:
            return np.full(len(total), np.nan)
        return 1 - self._reached(self._halved, np.abs(total)) / len(self._halved)

    def _length_columns(self, total: np.ndarray) -> dict[str, np.ndarray]:
        n, product = self.n, self._project(self._sums["times_length"])
        spread = self._length_squared - self._length**2 / n
        mean_length = self._length / n
        covariance = product - total * mean_length
        variance = np.maximum(self._squares - total**2 / n, 0)
        if n < 3 or spread <= 1e-9 * max(self._length_squared, 1e-30):
            unknown = np.full(len(total), np.nan)
            names = ("length_correlation", "attribution_at_equal_length", "length_p_value", "length_q_value")
            return dict.fromkeys(names, unknown)
        slope = covariance / spread
        intercept = (total - slope * self._length) / n
        residual = np.maximum(variance - slope * covariance, 0) / (n - 2)
        error = np.sqrt(residual * (1 / n + mean_length**2 / spread))
        p_value = 2 * stats.t.sf(np.abs(_ratio(intercept, error)), n - 2)
        return {
            "length_correlation": _ratio(covariance, np.sqrt(variance * spread)),
            "attribution_at_equal_length": intercept,
            "length_p_value": p_value,
            "length_q_value": benjamini_hochberg(p_value),
        }


def feature_statistics(
    parts: Callable[[], Iterable[Part]],
    dictionary: FeatureDictionary,
    n_examples: int,
    settings: ResamplingConfig | None = None,
) -> pd.DataFrame:
    """The table of an audit's features."""
    statistics = FeatureStatistics(dictionary, n_examples, settings)
    for part in parts():
        statistics.add(part)
    return statistics.frame()


def length_contrast(length: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Tokens of the answers of the positive side less those of the negative one, of each example [n]."""
    return (length.astype(np.float64) * side).sum(1)


class _SignedSums:
    """Sums of the examples' gradients under drawn signs, along features.

    Where there are fewer examples than dimensions, their contributions are added up instead of their gradients: that takes n and not
    d_model products a draw and feature.
    """

    def __init__(self, draws: int, n: int, d_model: int) -> None:
        self._draws = draws
        self._few = n < d_model
        self._signs: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []
        self._sums = torch.zeros(0 if self._few else draws, d_model, dtype=torch.float64)

    def __len__(self) -> int:
        return self._draws

    def add(self, signs: torch.Tensor, rows: torch.Tensor) -> None:
        """Some examples: signs [draws, k] and gradients [k, d_model]."""
        if self._few:
            self._signs.append(signs)
            self._rows.append(rows)
        else:
            self._sums += (signs @ rows).double()

    def along(self, chunk: DictionaryChunk) -> torch.Tensor:
        """[draws, features of the chunk] float32."""
        if not self._few:
            return chunk.project(self._sums.float())
        return torch.cat(self._signs, 1) @ chunk.project(torch.cat(self._rows))


class _FlipSigns:
    """The signs [flips, n] of all examples, made part by part; the same for any cut into parts."""

    def __init__(self, n: int, settings: ResamplingConfig) -> None:
        self.exact = n <= 30 and 2 ** (n - 1) <= settings.n_flips
        self._count = 2 ** (n - 1) if self.exact else settings.n_flips
        self._seed = settings.seed
        self._n = n

    def __len__(self) -> int:
        return self._count

    def of(self, examples: slice) -> torch.Tensor:
        """[flips, len(examples)] float32 of ±1."""
        numbers = range(examples.start, examples.stop)
        if self.exact:
            columns = [
                np.arange(self._count) >> (number - 1) & 1 if number else 0 * np.arange(self._count)
                for number in numbers
            ]
        else:
            columns = [_bits(self._seed, number, self._count) for number in numbers]
        return torch.from_numpy(1 - 2 * np.stack(columns, axis=1).astype(np.float32))


def _bits(seed: int, number: int, count: int) -> np.ndarray:
    words = np.random.default_rng([seed, number]).bytes(-(-count // 8))
    return np.unpackbits(np.frombuffer(words, np.uint8), count=count)


def _halves(n: int, settings: ResamplingConfig) -> np.ndarray:
    """Balanced signs [splits, n] int8: +1 in one half and -1 in the other, 0 for one example where n is odd."""
    signs = np.zeros(n, np.int8)
    signs[: n // 2], signs[n - n // 2 :] = 1, -1
    rng = np.random.default_rng([settings.seed, n, 1])
    return rng.permuted(np.tile(signs, (settings.n_halves, 1)), axis=1)


class _Activity:
    """How features are active on the two sides."""

    def __init__(self, d_sae: int) -> None:
        self._d_sae = d_sae
        self._sides = np.zeros(2)
        self._active, self._mean, self._max_activation = (np.zeros((2, d_sae)) for _ in range(3))
        self._activation_attribution, self._examples, self._discordant = (np.zeros(d_sae) for _ in range(3))
        self._selection = SelectionSums(1, d_sae)
        self._any = False

    def add(self, part: Part) -> None:
        arrays = part.arrays
        per_example = arrays.side.shape[1]
        owner = np.repeat(np.arange(arrays.side.size), np.diff(arrays.indptr))
        self._any |= len(owner) > 0
        side = arrays.side.reshape(-1)
        active = arrays.max_activation != 0
        for index, sign in enumerate((1, -1)):
            of_side = side[owner] == sign
            feature = arrays.feature[of_side]
            self._sides[index] += (side == sign).sum()
            self._active[index] += self._count(arrays.feature[of_side & active])
            self._mean[index] += np.bincount(feature, arrays.mean[of_side], self._d_sae)
            self._max_activation[index] += np.bincount(feature, arrays.max_activation[of_side], self._d_sae)
        self._activation_attribution += np.bincount(
            arrays.feature, arrays.activation_attribution, self._d_sae
        )
        example = owner[active] // per_example
        pairs, answers = np.unique(example * self._d_sae + arrays.feature[active], return_counts=True)
        self._examples += self._count(pairs % self._d_sae)
        self._selection.add(arrays, np.zeros(len(part.row), np.int64))
        if per_example == 2:
            self._discordant += self._count(pairs[answers == 1] % self._d_sae)

    def _count(self, features: np.ndarray) -> np.ndarray:
        """How often each feature occurs, [d_sae]."""
        return np.bincount(features, minlength=self._d_sae)

    def _selection_columns(self, n: int) -> dict[str, np.ndarray]:
        selection, squares = self._selection.of(np.array([0]))
        p_value = sign_flip_bound(selection, squares)
        return {
            "selection": selection / n,
            "selection_standard_error": standard_error_of_sum(selection, squares, n) / n,
            "selection_p_value": p_value,
            "selection_q_value": benjamini_hochberg(p_value),
        }

    def columns(self, n: int) -> dict[str, np.ndarray]:
        if not self._any:
            return {}
        with np.errstate(divide="ignore", invalid="ignore"):
            active, mean, max_activation = (
                table / self._sides[:, None] for table in (self._active, self._mean, self._max_activation)
            )
        columns = {
            **self._selection_columns(n),
            "activation_attribution": self._activation_attribution / n,
            "positive_active": active[0],
            "negative_active": active[1],
            "disparity": active[0] - active[1],
            "mean_activation_difference": mean[0] - mean[1],
            "max_activation_difference": max_activation[0] - max_activation[1],
            "active_examples": self._examples.astype(np.int64),
        }
        if self._discordant.any():
            difference = self._active[0] - self._active[1]
            columns["disparity_p_value"] = two_sided_normal_p(_ratio(difference, np.sqrt(self._discordant)))
        return columns


def sign_flip_bound(total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """A p-value of `|Σ c| ≥ |total|` under random signs of the c, from `Σ c²` alone; at most 3.2 times too large."""
    return np.minimum(1.0, RADEMACHER * two_sided_normal_p(_ratio(total, np.sqrt(squares))))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`, 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)
