"""Pictures are where their axes say, and numbers are written as they are meant."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from scipy.stats import t as student_t

from trl_sae_audit import RunRecord
from trl_sae_audit.report.axes import Scale, find_reach
from trl_sae_audit.report.charts import Line, choose_ticks, draw, thin_line
from trl_sae_audit.report.comparison import subtract_estimates
from trl_sae_audit.report.curriculum import draw_curriculum_map, encode_png
from trl_sae_audit.report.packing import pack_features
from trl_sae_audit.report.sources import open_source
from trl_sae_audit.report.tables import build_head_table
from trl_sae_audit.report.text import format_number, format_percent, format_probability, format_signed


def test_numbers_are_read_as_they_are_meant() -> None:
    assert [format_signed(-0.001234), format_signed(2), format_signed(0.0), format_signed(float("nan"))] == [
        "−0.00123",
        "+2",
        "0",
        "–",
    ]
    assert [format_probability(0.00001), format_probability(0.043)] == ["<0.001", "0.043"]
    assert [format_percent(0.123), format_percent(0.0081)] == ["12%", "0.81%"]


def test_all_features_are_packed_as_they_are(record: Path) -> None:
    import base64

    frame = RunRecord.load(record).features().sort_values("feature", ignore_index=True)
    frame["margin"] = 1.96 * frame["standard_error"]
    packed = pack_features(frame, most=10)
    numbers = np.frombuffer(base64.b64decode(packed["feature"]), "<u4")
    values = np.frombuffer(base64.b64decode(packed["columns"]["attribution"]), "<f4")
    assert packed["count"] == len(numbers) == 10
    np.testing.assert_allclose(values, frame["attribution"].to_numpy()[numbers], rtol=1e-6)
    assert (np.diff(np.abs(values)) <= 0).all()
    frame.loc[frame["attribution"].abs().idxmin(), "label"] = "kept"
    assert pack_features(frame, most=10)["count"] == 11


def test_the_tables_say_what_the_features_say(record: Path) -> None:
    source = open_source(record)
    table = build_head_table(source, source.views[0])
    features = RunRecord.load(record).features().set_index("feature")
    rows = [*table.gained, *table.lost]
    assert [row.feature for row in table.gained] == list(
        features[features["attribution"] > 0].nlargest(10, "attribution").index
    )
    for row in rows:
        values = features.loc[row.feature]
        degrees = values["degrees_of_freedom"]
        margin = float(student_t.ppf(0.975, degrees)) * values["standard_error"]
        assert row.value.text == format_signed(values["attribution"], padded=True)
        assert row.margin == f"{margin:.2g}"
        assert (row.whisker.middle > row.whisker.zero) == (values["attribution"] > 0)
        assert row.whisker.high - row.whisker.middle == pytest.approx(
            row.whisker.middle - row.whisker.low, abs=0.02
        )
        assert row.is_clear == (values["q_value"] < 0.05)
        assert row.trend_is_clear == (values["trend_q_value"] < 0.05)
        assert row.trend.text.startswith("↗" if values["trend_tau"] > 0 else "↘")
        assert [cell.text for cell in row.cells] == [
            format_percent(values["share"]),
            format_number(values["lift"], 2),
            format_signed(values["chosen"]),
            format_signed(values["rejected"]),
        ]
    assert {row.trend_is_clear for row in rows} == {True, False}
    assert {row.is_clear for row in rows} == {True, False}


def test_the_map_puts_what_moves_together_together() -> None:
    generator = np.random.default_rng(0)
    early, late = np.r_[np.ones(8), np.zeros(8)], np.r_[np.zeros(8), np.ones(8)]
    shapes = [early, late, -early, -late]
    means = np.stack([shapes[feature % 4] + generator.normal(0, 0.05, 16) for feature in range(40)], 1)
    means[3] = np.nan
    bins = np.stack([np.arange(16) * 2 + 1, np.arange(16) * 2 + 2], 1)
    found = draw_curriculum_map(means, bins, keep=[0], most=24)
    assert found is not None
    assert 0 in found.features
    assert 24 <= len(found.features) <= 25
    kinds = [feature % 4 for feature in found.features]
    assert sum(a != b for a, b in pairwise(kinds)) == 3  # each shape is one stretch
    for group in found.groups:
        shape = {feature % 4 for feature in group.features}
        assert len(shape) == 1
        assert group.direction == ("up" if min(shape) < 2 else "down")
        assert group.timing.when == ("early" if min(shape) % 2 == 0 else "late")
    np.testing.assert_array_equal(found.values, means[:, found.features].T)
    assert draw_curriculum_map(means[:1], bins[:1]) is None


def test_the_picture_is_a_png_of_these_pixels() -> None:
    index = np.array([[0, 1, 2], [2, 1, 0]])
    png = encode_png(index, [(0, 0, 0), (255, 0, 0), (0, 0, 255)], [0, 128, 255])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        kind, body = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack(">I", png[place + 8 + length : place + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind], place = body, place + 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    assert zlib.decompress(chunks[b"IDAT"]) == bytes([0, 0, 1, 2, 0, 2, 1, 0])


def test_curves_are_where_the_axes_say() -> None:
    x = np.arange(1, 11)
    drawing = draw("a", [Line("one", x, np.linspace(-2, 8, 10), np.full(10, 1.0))])
    assert drawing is not None
    points = [tuple(map(float, point.split())) for point in drawing.shapes[0].path[1:].split("L")]
    by_text = {float(text.replace("−", "-")): at for at, text in drawing.y_ticks}
    low, high = min(by_text), max(by_text)
    assert by_text[0.0] == pytest.approx(drawing.zero)
    for (_, down), value in zip(points, np.linspace(-2, 8, 10), strict=True):
        assert down == pytest.approx(100 * (high - value) / (high - low), abs=0.01)
    assert (points[0][0], points[-1][0]) == (0, 1000)
    assert drawing.rows[0] == ["1", "−2"]
    assert draw("none", [Line("gone", x, np.full(10, np.nan))]) is None
    only = draw("one point", [Line("it", np.array([3]), np.array([2.0]))])
    assert only is not None
    assert only.shapes[0].dots


def test_thinning_keeps_the_mean_and_shrinks_the_interval() -> None:
    line = thin_line(Line("a", np.arange(1000), np.arange(1000.0), np.ones(1000)), 100)
    assert len(line.x) == 100
    assert line.y.mean() == pytest.approx(499.5)
    assert line.margin is not None
    np.testing.assert_allclose(line.margin, 10**-0.5)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 2e-7), (0, 0), (17, 9_999), (5, 5)])
def test_ticks_hold_what_they_must(low: float, high: float) -> None:
    made = choose_ticks(low, high, 4)
    assert made[0] <= low
    assert made[-1] >= high
    assert 2 <= len(made) <= 8


def test_the_difference_of_rates_is_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II (a): 56/70 − 48/80, method 10: 0.0524 to 0.3339
    a, b = (binomtest(*counts).proportion_ci(method="wilson") for counts in ((56, 70), (48, 80)))
    gap = subtract_estimates(56 / 70, *a, 48 / 80, *b)
    assert (gap.estimate, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert gap.clear
    assert not subtract_estimates(1, None, None, 0, None, None).clear


@pytest.mark.parametrize("number", [1e308, -1e308, 1e-310, np.inf, np.nan])
def test_numbers_without_a_place_on_an_axis_are_left_out(number: float) -> None:
    steps = np.arange(1.0, 4.0)
    drawing = draw("a", [Line("one", steps, np.array([1.0, number, 2.0]), np.array([0.5, 0.5, number]))])
    assert drawing is not None
    assert drawing.y_ticks[-1][1] in ("2", "2.5", "3")
    assert draw("steps", [Line("one", np.array([1.0, number]), np.array([1.0, 2.0]))]) is not None
    assert find_reach([3.0, -5.0, number, np.nan]) == 5
    assert Scale.of(np.array([0.2, number if abs(number) > 1 else np.nan])) == Scale(1.0, "")
    assert np.isfinite(Scale.of(np.array([number])).factor)
