"""Tests and error bars, vectorised over features: arrays in, arrays out, NaN where a quantity is undefined.

With 65,536 features something always looks large, so each p-value here is meant to go through
`benjamini_hochberg` before anyone believes it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import brentq, minimize
from scipy.special import digamma, erfc, polygamma, stdtr
from torch import Tensor

NORMAL_QUANTILE = 1.96
"""Half the width of a 95 % interval of the normal distribution, in standard deviations."""
_FLOOR = 2.0
"""Medians of the features' deviations that the unit of every effect size has besides the feature's own."""
_CELLS = 1 << 20
"""Elements of the largest temporary array: small enough to stay in a processor's cache."""


def standard_error_of_sum(total: np.ndarray, sum_of_squares: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Standard error of a sum of n exchangeable contributions, from their spread; NaN for n < 2.

    `sqrt(n/(n-1) · (Σc² − (Σc)²/n))` = `sqrt(n) · s` with `s` the sample standard deviation (ddof=1).

    Args:
        total: Σc, any shape.
        sum_of_squares: Σc², same shape.
        n: number of contributions, a number or an array that broadcasts against `total`.
    """
    total, count = np.asarray(total, np.float64), np.asarray(n, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.maximum(np.asarray(sum_of_squares, np.float64) - total**2 / count, 0.0)
        return np.where(count < 2, np.nan, np.sqrt(count / (count - 1) * spread))


def selection_against_mean(products: Any, weights: Any, mean: Any) -> Any:
    """`Σ c·(a − ā)` from `Σ c·a`, `Σ c` and ā, arrays or tensors that broadcast; what a loss selects for, see `attribution.selection`."""
    return products - weights * mean


def selection_squares_against_mean(squares: Any, crossed: Any, weight_squares: Any, mean: Any) -> Any:
    """`Σ_i (Σ_t c_it·(a_it − ā))²` over examples, from `Σ_i (Σ_t c·a)²`, `Σ_i (Σ_t c)(Σ_t c·a)`, `Σ_i (Σ_t c)²` and ā."""
    return squares - 2 * mean * crossed + mean**2 * weight_squares


def effect_unit(deviation: np.ndarray) -> np.ndarray:
    """What a feature's change is divided by to be an effect size: `√(sd² + s²)`, s twice the (lower) median of sd over the features that vary.

    The constant keeps features that hardly ever occur, whose sd is next to nothing, from standing first by noise (Tusher et al. 2001).

    Args:
        deviation: standard deviation of each feature over answers [F]; NaN or 0 where it does not vary, and the unit is NaN.
    """
    known = np.where(deviation > 0, deviation, np.nan)
    if not np.isfinite(known).any():
        return known
    return np.hypot(known, least_effect_unit(deviation))


def least_effect_unit(deviation: np.ndarray) -> float:
    """`s` of `effect_unit`: what the change of a feature that occurs in none of the answers is divided by; NaN where no feature varies."""
    known = deviation[deviation > 0]
    return _FLOOR * float(np.quantile(known, 0.5, method="lower")) if len(known) else float("nan")


def effects_tell(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether the effects of many features say more than noise, by their 95 % intervals [F] each; NaN where there is none.

    Of intervals around nothing, one in twenty excludes 0. Where not even half as many do, the order of the effects is noise. Half and
    not all, since a few true effects among features that hardly vary look like that too (docs/studies/real-recovery.md).
    """
    known = np.isfinite(low) & np.isfinite(high)
    clear = (low > 0) | (high < 0)
    return bool(np.count_nonzero(clear & known) > 0.025 * np.count_nonzero(known))


def two_sided_normal_p(z: np.ndarray) -> np.ndarray:
    """`P(|N(0,1)| ≥ |z|)`, same shape as `z`, accurate far into the tail; NaN stays NaN."""
    return erfc(np.abs(z) / np.sqrt(2.0))


def two_sided_t_p(t: np.ndarray, degrees_of_freedom: np.ndarray) -> np.ndarray:
    """`P(|T| ≥ |t|)` of Student's t, same shape as `t`; infinite degrees of freedom give the normal; NaN stays NaN."""
    return 2.0 * stdtr(degrees_of_freedom, -np.abs(t))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values by Benjamini & Hochberg (1995) over all finite entries of `p` [F]; NaN stays NaN and does not count.

    Rejecting every feature with q ≤ α keeps the expected share of false discoveries at or below α, for
    p-values that are independent or positively dependent.
    """
    p = np.asarray(p, np.float64)
    q = np.full_like(p, np.nan)
    known = ~np.isnan(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known], method="bh")
    return q


def moderated_variance(variance: np.ndarray, degrees_of_freedom: float) -> tuple[np.ndarray, float]:
    """Variances of many features, each from few observations, drawn towards what all have in common (Smyth 2004, limma).

    With a prior `1/σ² ~ χ²(d₀)/(d₀·s₀²)`, fitted to the mean and variance of log s² over the features, the posterior mean is
    `(d₀·s₀² + d·s²)/(d₀ + d)`, and t statistics with it have d₀ + d degrees of freedom instead of d.

    Args:
        variance: s² [F], in units in which the features are alike; what is not above 0 does not count and stays as it is.
        degrees_of_freedom: d of each.

    Returns:
        The moderated variances [F], and d₀ + d, infinite where the features differ by chance alone.
    """
    known = np.isfinite(variance) & (variance > 0)
    if not known.any():
        return variance.copy(), degrees_of_freedom
    half = degrees_of_freedom / 2
    logarithm = np.log(variance[known]) - digamma(half) + np.log(half)
    excess = logarithm.var(ddof=min(1, known.sum() - 1)) - polygamma(1, half)
    moderated = variance.copy()
    if excess <= 1e-6:
        moderated[known] = np.exp(logarithm.mean())
        return moderated, np.inf
    prior = np.exp(brentq(lambda log: polygamma(1, np.exp(log)) - excess, -20, 20))
    common = np.exp(logarithm.mean() + digamma(prior) - np.log(prior))
    moderated[known] = (prior * common + half * variance[known]) / (prior + half)
    return moderated, 2 * prior + degrees_of_freedom


def mann_kendall(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Monotone-trend test of each column over time (Mann 1945, Kendall 1975), two-sided.

    `S = Σ_{i<j} sign(x_j − x_i)`; tau is Kendall's tau-b between time and value (positive = rising); p is
    from the normal approximation with continuity correction and the variance corrected for ties,
    `Var S = [n(n−1)(2n+5) − Σ_ties t(t−1)(2t+5)] / 18`. Values must be independent over time for p to hold.

    Args:
        series: [T, F], time from first to last row.

    Returns:
        tau [F] and p [F], float64; NaN for a column that holds a NaN, that is constant, or with T < 2.
    """
    series = np.asarray(series)
    n_times, n_features = series.shape
    score = np.empty(n_features)
    tied_pairs = np.empty(n_features)
    tie_variance = np.zeros(n_features)
    width = max(1, _CELLS // max(4 * n_times, 1))
    for start in range(0, n_features, width):
        columns = slice(start, min(start + width, n_features))
        block = np.ascontiguousarray(series[:, columns])
        score[columns], tied_pairs[columns] = _rank_score(block)
        tied = np.flatnonzero(tied_pairs[columns])
        if len(tied):
            tie_variance[start + tied] = _tie_variance(block[:, tied])

    pairs = n_times * (n_times - 1) / 2
    variance = (n_times * (n_times - 1) * (2 * n_times + 5) - tie_variance) / 18
    with np.errstate(divide="ignore", invalid="ignore"):
        tau = score / np.sqrt(pairs * (pairs - tied_pairs))
        z = (score - np.sign(score)) / np.sqrt(variance)
    undefined = np.isnan(series).any(axis=0) | (tied_pairs >= pairs)
    return np.where(undefined, np.nan, tau), np.where(undefined, np.nan, two_sided_normal_p(z))


def _rank_score(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`S` and the number of tied pairs of each column of `block` [T, C]."""
    n_times, n_columns = block.shape
    rising = np.zeros(n_columns, np.int64)
    falling = np.zeros(n_columns, np.int64)
    for earlier in range(n_times - 1):
        later = block[earlier + 1 :]
        rising += np.add.reduce(later > block[earlier], axis=0, dtype=np.int32)
        falling += np.add.reduce(later < block[earlier], axis=0, dtype=np.int32)
    return (rising - falling).astype(np.float64), n_times * (n_times - 1) / 2 - (rising + falling)


def _tie_variance(block: np.ndarray) -> np.ndarray:
    """`Σ_groups t(t−1)(2t+5)` of each column, as a sum over members of `(t−1)(2t+5)`."""
    correction = np.zeros(block.shape[1])
    for row in block:
        members = (block == row).sum(axis=0)
        correction += (members - 1) * (2 * members + 5)
    return correction


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval, in the unit of what was estimated."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def contains(self, value: float) -> bool:
        """Whether `value` lies in the interval, bounds included."""
        return self.low <= value <= self.high


def balanced_accuracy(hits: int, positives: int, rejections: int, negatives: int) -> Interval:
    """The mean of the shares that are right among positives and among negatives, with its 95 % interval.

    The interval joins the Wilson limits of the two shares by the method of variance estimates recovery (Zou & Donner 2008):
    `½·√((p₁ − l₁)² + (p₂ − l₂)²)` below the estimate, likewise above. It holds at shares of 0 and 1.

    Args:
        hits: positives that were called so, of `positives`.
        rejections: negatives that were called so, of `negatives`.
    """
    parts = [(hits, positives), (rejections, negatives)]
    shares = np.array([right / n for right, n in parts])
    limits = [stats.binomtest(right, n).proportion_ci(0.95, method="wilson") for right, n in parts]
    below, above = (np.array([getattr(each, end) for each in limits]) for end in ("low", "high"))
    reach = (float(np.hypot(*(shares - below))) / 2, float(np.hypot(*(above - shares))) / 2)
    estimate = float(shares.mean())
    return Interval(estimate, estimate - reach[0], estimate + reach[1])


def resampling_counts(n: int, draws: int, seed: int = 0) -> np.ndarray:
    """How often each of n units is drawn in each bootstrap resample: [draws, n], every row adding up to n.

    For statistics of weighted sums, where drawing rows one by one would be slow.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)


def centred_interval(
    estimate: float,
    replicates: np.ndarray,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """The spread of bootstrap replicates around their own mean, laid around the estimate, within `bounds`.

    For statistics that sampling noise biases, such as R²: resampling adds the noise a second time, so that the replicates'
    own percentiles would be off the estimate. NaN if the estimate or a replicate is.
    """
    if np.isnan(estimate) or np.isnan(replicates).any():
        return Interval(estimate, np.nan, np.nan)
    ends = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2]) - np.mean(replicates)
    low, high = np.clip(estimate + ends, *bounds)
    return Interval(float(estimate), float(low), float(high))


_PRIOR = 3.0


def explain_preferences(gaps: Tensor) -> Tensor:
    """The coefficients with which score gaps explain which answer was preferred, by penalised maximum likelihood.

        λ = argmax_{λ ≥ 0} Σ_i log σ(Σ_f λ_f·δ_if) − ½ Σ_f (λ_f·sd(δ_f) / 3)²

    The first term is concave, a Bradley–Terry model with covariates; the second, a prior of 3 log-odds for a standard
    deviation, is felt only where a gap decides nearly every pair, and keeps λ finite there.

    Args:
        gaps: δ, score of the chosen answer minus that of the rejected one [n, k], float64.

    Returns:
        λ [k], float64: log-odds for each unit of score; 0 for a gap that the preferences are against, or that others
        explain as well.
    """
    spread = gaps.std(0, unbiased=False)
    spread = torch.where(spread > 0, spread, 1.0)
    units = gaps / spread

    def objective(values: Any) -> tuple[float, Any]:
        weights = torch.tensor(values, dtype=torch.float64)
        margin = units @ weights
        loss = -F.logsigmoid(margin).sum() + 0.5 * (weights / _PRIOR).square().sum()
        slope = -(units * torch.sigmoid(-margin)[:, None]).sum(0) + weights / _PRIOR**2
        return float(loss), slope.numpy()

    k = gaps.shape[1]
    solution = minimize(objective, [0.0] * k, jac=True, method="L-BFGS-B", bounds=[(0, None)] * k)
    return torch.tensor(solution.x, dtype=torch.float64) / spread
