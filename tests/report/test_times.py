"""When something moved, by the stated rule."""

from __future__ import annotations

import numpy as np
import pytest

from trl_sae_audit.report.times import accumulate, find_timing

BINS = np.stack([np.arange(12) * 5 + 1, np.arange(12) * 5 + 5], 1)
EVEN = np.ones(12)
EARLY, LATE = np.r_[np.ones(4), np.zeros(8)], np.r_[np.zeros(8), np.ones(4)]
BACK = np.r_[np.ones(6), -0.8 * np.ones(6)]


@pytest.mark.parametrize(
    ("flow", "when", "half_by"),
    [(EVEN, "throughout", 30), (EARLY, "early", 10), (LATE, "late", 50), (BACK, "comes and goes", 60)],
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [False, True])
def test_a_group_is_told_by_its_sum(flow, when, half_by, sign, level) -> None:
    """Noise in every feature, as large as what moves it, does not make everything look as if it moved throughout."""
    noise = np.random.default_rng(0).normal(0, 1, (60, 12))
    values = sign * (flow + noise)
    if level:
        values = np.cumsum(values, axis=1)
    found = find_timing(accumulate(values, BINS, level=level), BINS)
    assert found.when == when
    if when != "comes and goes":
        assert abs(found.half_by - half_by) <= 5


def test_steps_count_by_how_many_a_bin_has() -> None:
    bins = np.array([[1, 8], [9, 16], [17, 17]])
    changes = accumulate(np.array([[1.0, np.nan, 3.0]]), bins, level=False)
    np.testing.assert_allclose(changes, [[8, 8, 11]])
    assert find_timing(changes, bins).when == "early"
    assert find_timing(np.zeros((2, 3)), bins).when == "comes and goes"
