"""Running totals of one score of every feature over a run, in memory that does not depend on the number of steps.

Everything is accumulated step by step in float64, so the result does not depend, to the bit, on how steps are grouped into
calls, or on a stop and a resume between two of them.
"""

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import pandas as pd

from ..errors import AuditError
from ..io.untrusted import check_fits
from ..statistics import benjamini_hochberg, mann_kendall, two_sided_t_p
from .curriculum import CurriculumMap

_SUMS = (
    "score",
    "score_squared",
    "score_times_step",
    "positive",
    "negative",
    "variance",
    "variance_spread",
    "share",
)
_COUNTS = ("positive_steps", "negative_steps")
_SCALARS = ("steps", "nonfinite_steps", "variance_steps", "curriculum.width", "curriculum.max_bins")
_AVERAGED_EXTRAS = ("token_share", "activation", "frequency")
"""Extras of which `frame` shows the mean over steps; of any other extra it shows the sum."""

BYTES_PER_FEATURE = 8 * len(_SUMS) + 4 * len(_COUNTS) + 4 * 64
"""Memory of one score's totals with all 64 time bins in use, without extras."""
BYTES_PER_EXTRA = 8

_BLOCK = 16384
"""Features added at a time, so that their sums stay in the processor's cache over the steps."""


class ScoreTotals:
    """Sums of one score of a dictionary's features over the optimizer steps of a run.

    Args:
        n_features: F = d_sae.
        max_bins: time bins of the curriculum map.

    Attributes:
        steps: optimizer steps seen, including the non-finite ones.
        nonfinite_steps: steps omitted from every sum because something about them was not finite.
        variance_steps: steps whose standard error was known (two examples or more).
        sums: name → float64 [F], summed over the finite steps.
        extras: name → float64 [F], the sums of the caller's extras.
        curriculum: the map over time.
    """

    def __init__(self, n_features: int, max_bins: int = 64):
        self.n_features = n_features
        self.steps = 0
        self.nonfinite_steps = 0
        self.variance_steps = 0
        self.sums = {name: np.zeros(n_features) for name in _SUMS}
        self.counts = {name: np.zeros(n_features, np.int32) for name in _COUNTS}
        self.extras: dict[str, np.ndarray] = {}
        self.curriculum = CurriculumMap(n_features, max_bins)
        self._step_sum = 0.0
        self._step_square_sum = 0.0

    @property
    def finite_steps(self) -> int:
        """Steps that entered the sums."""
        return self.steps - self.nonfinite_steps

    def update(
        self,
        score: np.ndarray,
        positive: np.ndarray,
        negative: np.ndarray,
        variance: np.ndarray,
        share: np.ndarray,
        degrees: np.ndarray | None = None,
        extras: Mapping[str, np.ndarray] | None = None,
        finite: np.ndarray | None = None,
    ) -> None:
        """Add S consecutive optimizer steps.

        Args:
            score: [S, F].
            positive: [S, F], of the chosen or reinforced side.
            negative: [S, F], of the rejected or suppressed side.
            variance: [S, F], squared standard error of each step's score; a row of NaN where it is unknown (fewer than
                two examples).
            share: [S, F], squared cosine between the step's gradient and the feature; 0 where the gradient is 0.
            degrees: [S], degrees of freedom of each step's variance, its number of examples minus one; None if the
                variance counts as known.
            extras: name → [S, F]; the same names at every call.
            finite: [S], False for a step whose gradient was not finite. Such a step, and one whose score is not finite,
                is counted but enters no sum.

        Raises:
            AuditError: an array of another shape, or extras under other names than before.
        """
        rows = {
            "score": score,
            "positive": positive,
            "negative": negative,
            "variance": variance,
            "share": share,
        }
        rows = self._check_rows(rows)
        extra_rows = self._check_extras(extras or {}, len(rows["score"]))
        keep = np.isfinite(rows["score"]).all(axis=1)
        if finite is not None:
            keep &= np.asarray(finite, bool)
        known = keep & ~np.isnan(rows["variance"]).all(axis=1)
        first_step = self.steps + 1
        inverse_degrees = np.zeros(len(keep)) if degrees is None else 1.0 / np.maximum(degrees, 1)
        for start in range(0, self.n_features, _BLOCK):
            self._add_block(
                slice(start, start + _BLOCK), rows, extra_rows, keep, known, inverse_degrees, first_step
            )
        for row, kept in zip(rows["score"], keep, strict=True):
            self._count_step(row, bool(kept))
        self.variance_steps += int(known.sum())

    def _add_block(
        self,
        features: slice,
        rows: dict[str, np.ndarray],
        extra_rows: dict[str, np.ndarray],
        keep: np.ndarray,
        known: np.ndarray,
        inverse_degrees: np.ndarray,
        first_step: int,
    ) -> None:
        sums = {name: total[features] for name, total in self.sums.items()}
        counts = {name: total[features] for name, total in self.counts.items()}
        scratch = np.empty_like(sums["score"])
        exact = np.empty_like(scratch)
        for index in np.flatnonzero(keep):
            row = rows["score"][index, features]
            exact[:] = row
            sums["score"] += exact
            sums["score_times_step"] += np.multiply(exact, first_step + index, out=scratch)
            sums["score_squared"] += np.multiply(exact, exact, out=scratch)
            counts["positive_steps"] += row > 0
            counts["negative_steps"] += row < 0
            for name in ("positive", "negative", "share"):
                sums[name] += rows[name][index, features]
            if known[index]:
                exact[:] = rows["variance"][index, features]
                sums["variance"] += exact
                np.multiply(exact, exact, out=scratch)
                sums["variance_spread"] += np.multiply(scratch, inverse_degrees[index], out=scratch)
            for name, extra in extra_rows.items():
                self.extras[name][features] += extra[index, features]

    def _count_step(self, score: np.ndarray, finite: bool) -> None:
        self.steps += 1
        if finite:
            self.curriculum.add(score)
            self._step_sum += self.steps
            self._step_square_sum += self.steps**2
        else:
            self.curriculum.skip()
            self.nonfinite_steps += 1

    def _check_rows(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = {name: np.asarray(values) for name, values in rows.items()}
        expected = (len(arrays["score"]), self.n_features)
        for name, values in arrays.items():
            if values.shape != expected:
                raise AuditError(
                    f"{name} has shape {values.shape}, but these totals need {expected}: one row per step and one "
                    f"column for each of the dictionary's {self.n_features} features."
                )
        return arrays

    def _check_extras(self, extras: Mapping[str, np.ndarray], n_steps: int) -> dict[str, np.ndarray]:
        if self.steps == 0 and not self.extras:
            self.extras = {name: np.zeros(self.n_features) for name in extras}
        if set(extras) != set(self.extras):
            raise AuditError(
                f"extras are named {sorted(extras)}, but earlier steps had {sorted(self.extras)}: pass the same "
                "names at every step of a run."
            )
        rows = self._check_rows({"score": np.broadcast_to(0.0, (n_steps, self.n_features)), **extras})
        return {name: rows[name] for name in extras}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything, as arrays that share memory with this object: store or copy them before the next update."""
        state: dict[str, np.ndarray] = {f"sums.{name}": total for name, total in self.sums.items()}
        state |= {f"counts.{name}": total for name, total in self.counts.items()}
        state |= {f"extras.{name}": total for name, total in self.extras.items()}
        state["curriculum.sums"] = self.curriculum.sums
        state["curriculum.counts"] = self.curriculum.counts
        counters = (self.steps, self.nonfinite_steps, self.variance_steps)
        scalars = (*counters, self.curriculum.width, self.curriculum.max_bins)
        state |= {name: np.array([value], np.int64) for name, value in zip(_SCALARS, scalars, strict=True)}
        state["step_moments"] = np.array([self._step_sum, self._step_square_sum])
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "ScoreTotals":
        """The totals that `state_dict` described, to the bit.

        Raises:
            AuditError: an array is missing, unknown, or of the wrong type or shape.
        """
        extras = [name.removeprefix("extras.") for name in state if name.startswith("extras.")]
        _check_state(state, extras)
        totals = cls(state["sums.score"].shape[0], int(state["curriculum.max_bins"][0]))
        totals.sums = {name: state[f"sums.{name}"].copy() for name in _SUMS}
        totals.counts = {name: state[f"counts.{name}"].copy() for name in _COUNTS}
        totals.extras = {name: state[f"extras.{name}"].copy() for name in extras}
        totals.steps = int(state["steps"][0])
        totals.nonfinite_steps = int(state["nonfinite_steps"][0])
        totals.variance_steps = int(state["variance_steps"][0])
        totals._step_sum, totals._step_square_sum = map(float, state["step_moments"])
        sums, counts = state["curriculum.sums"], state["curriculum.counts"]
        totals.curriculum.load(sums, counts, int(state["curriculum.width"][0]), totals.steps)
        return totals

    def frame(self, d_model: int) -> pd.DataFrame:
        """One row per feature, in the order of the dictionary, with the columns that `FeatureTotals.frame` describes.

        Args:
            d_model: width of the residual stream.
        """
        sums, n = self.sums, self.finite_steps
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = np.float64(1.0) / n if n else np.nan
            scale = n / self.variance_steps if self.variance_steps else np.nan
            standard_error = np.sqrt(sums["variance"] * scale)
            z = np.where(standard_error > 0, sums["score"] / standard_error, np.nan)
            degrees_of_freedom = np.square(sums["variance"]) / sums["variance_spread"]
        p_value = two_sided_t_p(z, degrees_of_freedom)
        seen = self.curriculum.counts > 0
        tau, trend_p = mann_kendall(self.curriculum.means()[seen])
        columns = {
            "feature": np.arange(self.n_features),
            "score": sums["score"],
            "score_mean": sums["score"] * inverse,
            "standard_error": standard_error,
            "z": z,
            "degrees_of_freedom": degrees_of_freedom,
            "p_value": p_value,
            "q_value": benjamini_hochberg(p_value),
            "share": sums["share"] * inverse,
            "lift": sums["share"] * inverse * d_model,
            **self.counts,
            "positive": sums["positive"],
            "negative": sums["negative"],
            "trend": self._slope(),
            "trend_tau": tau,
            "trend_p_value": trend_p,
            "trend_q_value": benjamini_hochberg(trend_p),
        }
        for name, total in self.extras.items():
            columns[name] = total * inverse if name in _AVERAGED_EXTRAS else total
        return pd.DataFrame(columns)

    def _slope(self) -> np.ndarray:
        """Least-squares slope of the score against the step, [F]; NaN with fewer than two finite steps."""
        if self.finite_steps < 2:
            return np.full(self.n_features, np.nan)
        mean_step = self._step_sum / self.finite_steps
        spread = self._step_square_sum - self._step_sum * mean_step
        return (self.sums["score_times_step"] - mean_step * self.sums["score"]) / spread


def _check_state(state: Mapping[str, np.ndarray], extras: list[str]) -> None:
    """Refuse, with an AuditError, a state that `ScoreTotals.state_dict` could not have made."""
    expected: dict[str, tuple[type, tuple[int, ...]]] = dict.fromkeys(_SCALARS, (np.int64, (1,)))
    check_arrays(state, expected)
    if "sums.score" not in state:
        raise AuditError("The sum of scores is missing: these totals are damaged, so use another copy.")
    features = state["sums.score"].shape[:1]
    expected |= {f"sums.{name}": (np.float64, features) for name in _SUMS}
    expected |= {f"counts.{name}": (np.int32, features) for name in _COUNTS}
    expected |= {f"extras.{name}": (np.float64, features) for name in extras}
    expected["step_moments"] = (np.float64, (2,))
    steps, width, max_bins = (
        int(state[name][0]) for name in ("steps", "curriculum.width", "curriculum.max_bins")
    )
    finite = steps - int(state["nonfinite_steps"][0])
    if not (0 <= finite <= steps and 0 <= int(state["variance_steps"][0]) <= finite and width > 0):
        raise AuditError("The steps these totals count do not agree: they are damaged, so use another copy.")
    bins = min(-(-steps // width), max_bins)
    expected["curriculum.sums"] = (np.float32, (bins, *features))
    expected["curriculum.counts"] = (np.int64, (bins,))
    check_arrays(state, expected)
    if int(state["curriculum.counts"].sum()) != finite or not np.isfinite(state["sums.score"]).all():
        raise AuditError(
            "The sums and counts of these totals do not agree: they are damaged, so use another copy."
        )
    check_fits("the map over time", 4 * max_bins * features[0])
    if unknown := sorted(set(state) - set(expected)):
        raise_unknown(unknown[0])


def raise_unknown(name: str) -> NoReturn:
    """Refuse totals with an array that no version knows, or not this one."""
    raise AuditError(
        f"{name!r} is not part of totals: another version of trl-sae-audit wrote them. Use that one."
    )


def check_arrays(
    state: Mapping[str, np.ndarray], expected: Mapping[str, tuple[type, tuple[int, ...]]]
) -> None:
    """Refuse, with an AuditError, arrays that are missing, or of another type or shape than `expected`."""
    for name, (kind, shape) in expected.items():
        if name not in state or state[name].dtype != kind or state[name].shape != shape:
            actual = f"{state[name].dtype} {state[name].shape}" if name in state else "missing"
            raise AuditError(
                f"{name!r} of these totals is {actual} instead of {np.dtype(kind)} {shape}: they are damaged or of "
                "another version of trl-sae-audit, so use another copy."
            )
