"""Tests and error bars, vectorised over features: arrays in, arrays out, NaN where a quantity is undefined.

With 65,536 features something always looks large, so each p-value here is meant to go through
`benjamini_hochberg` before anyone believes it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import erfc, stdtr

from .errors import AuditError

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


def sign_flip_p(contributions: np.ndarray, n_flips: int = 9999, seed: int = 0) -> np.ndarray:
    """Sign-flip test of each feature's mean contribution over examples, two-sided.

    Under the null, swapping chosen and rejected of an example, which flips the sign of its contribution, changes
    nothing in distribution. The same flips serve all features, so their dependence is kept. All `2^(n−1)`
    distinct flips are enumerated when there are at most `n_flips` of them, which makes p exact; otherwise
    `n_flips` are drawn and `p = (1 + #{|flipped sum| ≥ |sum|}) / (1 + n_flips)` (Phipson & Smyth 2010), which is
    never below `1 / (1 + n_flips)`: after Benjamini–Hochberg over F features, k features at that floor reach
    `q = F / (k·(1 + n_flips))` at best, so choose `n_flips` with F in mind.

    Args:
        contributions: [n, F], one row an example.
        n_flips: random flips to draw, or the largest number to enumerate.
        seed: of the random flips.

    Returns:
        p [F], float64; NaN for a feature with a NaN or infinite contribution, and for n = 0.
    """
    contributions = np.asarray(contributions)
    n, n_features = contributions.shape
    if n == 0:
        return np.full(n_features, np.nan)
    exact = n - 1 < 62 and 2 ** (n - 1) <= n_flips
    signs = _every_sign(n) if exact else _random_signs(n, n_flips, seed)
    reached = np.zeros(n_features, np.int64)
    finite = np.zeros(n_features, bool)
    rows = 1024
    width = max(1, _CELLS // max(n, min(rows, len(signs))))
    for start in range(0, n_features, width):
        columns = slice(start, min(start + width, n_features))
        block = contributions[:, columns].astype(np.float64)
        finite[columns] = np.isfinite(block).all(axis=0)
        block[:, ~finite[columns]] = 0.0
        threshold = np.abs(block.sum(axis=0)) - 1e-12 * np.abs(block).sum(axis=0)
        for first in range(0, len(signs), rows):
            flipped = signs[first : first + rows].astype(np.float64) @ block
            reached[columns] += (np.abs(flipped) >= threshold).sum(axis=0)
    p = reached / len(signs) if exact else (1 + reached) / (1 + len(signs))
    return np.where(finite, p, np.nan)


def _every_sign(n: int) -> np.ndarray:
    """All sign vectors [2^(n−1), n] that start with +1; the others are their negatives, with the same |sum|."""
    bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1)[None, :] & 1
    return np.concatenate([np.ones((len(bits), 1), np.int8), (1 - 2 * bits).astype(np.int8)], axis=1)


def _random_signs(n: int, n_flips: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).integers(0, 2, size=(n_flips, n), dtype=np.int8)
    return 1 - 2 * draws


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


def bootstrap_interval(
    sample: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron 1979) of a statistic over the rows of a sample.

    What is drawn again is a row, so rows must be the independent units (seeds, examples, features), and paired
    quantities must stand in one row. With few rows percentile intervals are too narrow: five seeds cover about 85 % instead
    of 95 %.

    Args:
        sample: [n, …], one row a unit.
        statistic: sample of any number of rows → number.
        draws: resamples.
        confidence: coverage of the interval.
        seed: of the resampling.

    Raises:
        AuditError: if the sample is empty.
    """
    sample = np.asarray(sample)
    if not len(sample):
        raise AuditError("There is nothing to estimate from: the sample is empty.")
    generator = np.random.default_rng(seed)
    values = [statistic(sample[generator.integers(0, len(sample), len(sample))]) for _ in range(draws)]
    low, high = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(sample)), float(low), float(high))


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
    own percentiles would lie beside the estimate. NaN if the estimate or a replicate is.
    """
    if np.isnan(estimate) or np.isnan(replicates).any():
        return Interval(estimate, np.nan, np.nan)
    ends = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2]) - np.mean(replicates)
    low, high = np.clip(estimate + ends, *bounds)
    return Interval(float(estimate), float(low), float(high))
