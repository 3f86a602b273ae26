"""When in a run something moved: early, late, throughout, or back and forth, by a stated rule.

Of some features the change up to a time is `C(t) = Σ_f sign_f · C_f(t)`, with `C_f` the running sum of what moved the feature (selection,
attribution), or the level itself where that is what is known (drift), and `sign_f` the way in which the feature takes part in what they
have in common, their first principal component. Noise, which has no sign, cancels in `C`; in the size of what moved, which is what one
sees in a map, it does not, and makes everything look as if it moved throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """When some features moved.

    Attributes:
        when: "early", "late", "throughout" or "comes and goes".
        half_by: the step from which on at least half of the final change is there.
    """

    when: str
    half_by: int


def accumulate(values: np.ndarray, bins: np.ndarray, *, level: bool) -> np.ndarray:
    """The change of each feature up to the end of each bin [features, bins].

    Args:
        values: means per step in the bins, or levels at their ends, [features, bins]; NaN where unknown.
        bins: (first, last) step of each [bins, 2].
        level: which of the two `values` are.
    """
    known = np.nan_to_num(np.asarray(values, float))
    if level:
        return known
    return np.cumsum(known * (bins[:, 1] - bins[:, 0] + 1), axis=1)


def find_timing(changes: np.ndarray, bins: np.ndarray) -> Timing:
    """When some features moved, by their changes [features, bins] as `accumulate` gives them.

    Comes and goes: the change was once more than twice what is left of it. Early: half of it had come about after a third of the steps.
    Late: half of it came in the last third. Throughout: none of these.
    """
    common = np.linalg.svd(changes, full_matrices=False)[0][:, 0]
    curve = np.sign(common) @ changes
    curve = curve * (np.sign(curve[-1]) or 1.0)
    steps, first = bins[:, 1].astype(float), float(bins[0, 0]) - 1
    end = curve[-1]
    if not end > 0:
        return Timing("comes and goes", int(steps[-1]))
    below = np.flatnonzero(curve < end / 2)
    half_by = int(steps[0] if not len(below) else steps[min(below[-1] + 1, len(steps) - 1)])
    if np.abs(curve).max() > 2 * end:
        return Timing("comes and goes", half_by)
    thirds = first + (steps[-1] - first) * np.array([1 / 3, 2 / 3])
    early, most = np.interp(thirds, [first, *steps], [0.0, *curve]) / end
    return Timing("early" if early >= 0.5 else "late" if 1 - most >= 0.5 else "throughout", half_by)
