"""Numbers for readers."""

from __future__ import annotations

import math

import pytest

from trl_sae_audit.report.text import format_number, format_signed


@pytest.mark.parametrize(
    ("value", "short", "padded"),
    [(2, "+2", "+2.0"), (-0.98, "−0.98", "−0.98"), (12.3, "+12", "+12"), (0, "0", "0"), (math.nan, "–", "–")],
)
def test_a_column_of_numbers_keeps_its_digits(value: float, short: str, padded: str) -> None:
    assert format_signed(value, 2) == short
    assert format_signed(value, 2, padded=True) == padded
    assert format_number(value, 2, padded=True) == padded.lstrip("+")
