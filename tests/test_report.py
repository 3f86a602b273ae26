"""The report's file: what it says comes from the numbers, and what others wrote in it is harmless."""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_sources import HOSTILE, make_dictionary, make_evidence, make_record
from scipy.stats import binomtest
from scipy.stats import t as student_t

from trl_sae_audit import AuditError, RunRecord, cli
from trl_sae_audit.evidence_files import FILE as EVIDENCE
from trl_sae_audit.evidence_files import read_evidence, write_evidence
from trl_sae_audit.outcomes import Outcome, write_outcomes
from trl_sae_audit.record_writer import RecordWriter
from trl_sae_audit.report import write_report
from trl_sae_audit.report.charts import Line, draw, thinned, ticks
from trl_sae_audit.report.comparison import difference_of_estimates
from trl_sae_audit.report.curriculum import curriculum_map, png_bytes
from trl_sae_audit.report.packing import as_json, packed_features
from trl_sae_audit.report.sources import open_source
from trl_sae_audit.report.tables import head_table
from trl_sae_audit.report.text import percent, plain, probability, shown, signed
from trl_sae_audit.totals import FeatureTotals


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_record(tmp_path_factory.mktemp("runs") / "plain", make_dictionary())


class Page(HTMLParser):
    """Text, tags and the embedded data of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in = ""
        self.scripts: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag in ("td", "th", "p", "li"):
            self.text += " "
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def test_the_sentences_say_what_the_record_says(record: Path, tmp_path: Path) -> None:
    write_outcomes(
        record,
        [
            Outcome("flatters", 0.4, 0.35, 0.45, 400, "flatters the user", "before", "down", "share"),
            Outcome("flatters", 0.9, 0.87, 0.92, 400, "flatters the user", "after", "down", "share"),
        ],
    )
    page = Page(write_report(record, tmp_path / "page.html"))
    features = RunRecord.load(record).features()
    up = features.loc[features["attribution"].idxmax()]
    down = features.loc[features["attribution"].idxmin()]
    assert (up["feature"], down["feature"]) == (3, 5)
    text = " ".join(page.text.split())
    assert (
        "DPO, 48 optimizer steps, model “tiny-model”, 64 features of the dictionary “tiny” at model.layers.1"
        in text
    )
    assert f"hardest towards “flattery” (feature 3), with {up['lift']:.2g} times the share" in text
    assert f"hardest away from feature 5, with {down['lift']:.2g} times the share" in text
    significant = int((features["q_value"] < 0.05).sum())
    assert f"{significant} of 64 features are beyond chance" in text
    assert "hold 60% of its gradient, where 4 random directions hold 25%" in text
    assert "“flatters the user” (less is better) went from 40% to 90% in plain" in text
    assert signed(up["attribution"]) in text
    assert not re.search(r"\bnan\b|None|undefined", text)


def test_nothing_is_loaded_from_anywhere(record: Path, tmp_path: Path) -> None:
    page = Page(write_report(record, tmp_path / "page.html"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "srcset", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "@import" not in page.source
    assert "url(" not in page.source
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy


def test_every_header_and_picture_says_what_it_is(record: Path, tmp_path: Path) -> None:
    page = Page(write_report(record, tmp_path / "page.html"))
    assert ("html", {"lang": "en"}) in page.tags
    for tag, attributes in page.tags:
        if tag == "th":
            assert attributes.get("scope") in ("col", "row", "rowgroup")
        if tag == "img":
            assert "alt" in attributes
        if tag == "svg":
            assert attributes["aria-label"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    dictionary = make_dictionary(name=HOSTILE.replace("\ud800", ""))
    label = HOSTILE.replace("\ud800", "")
    directory = make_record(tmp_path / "run", dictionary, watch={label: 3})
    long = "<b>" + "x" * 100_000
    write_evidence(directory, [make_evidence(dictionary, text=HOSTILE), make_evidence(dictionary, 5, long)])
    write_outcomes(directory, [Outcome("m", 0.5, label=HOSTILE)])
    page = Page(write_report(directory, tmp_path / "page.html", title=HOSTILE, note=HOSTILE, names=[HOSTILE]))
    assert len(page.scripts) == 2
    assert "owned" not in page.scripts[1]
    assert not [tag for tag, attributes in page.tags if tag == "img" and attributes.get("src") == "x"]
    assert "\u202e" not in page.source
    assert "\u2028" not in page.source
    assert "\0" not in page.source
    assert "⟨U+202E⟩" in page.text
    assert len(page.source) < 400_000
    words = page.data["dictionaries"][0]["evidence"]["3"]["examples"][0]["answers"][0]["tokens"]
    assert any("⟨U+202E⟩" in word for word in words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("שלום 👩‍👩‍👧", "שלום 👩‍👩‍👧"),
        ("\x00\x1b[31m\u2028\u2066", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+2028⟩⟨U+2066⟩"),
        ("x" * 12, "xxxxxxxxxx… (2 more characters)"),
    ],
)
def test_what_is_invisible_is_shown(text: str, expected: str) -> None:
    assert shown(text, 10 if text.startswith("xx") else 2000) == expected


def test_data_in_a_script_cannot_leave_it() -> None:
    text = as_json({"a": "</script><!--&\u2028\ud800"})
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!--&\u2028\ud800"}


def test_numbers_are_read_as_they_are_meant() -> None:
    assert [signed(-0.001234), signed(2), signed(0.0), signed(float("nan"))] == ["−0.00123", "+2", "0", "–"]
    assert [probability(0.00001), probability(0.043)] == ["<0.001", "0.043"]
    assert [percent(0.123), percent(0.0081)] == ["12%", "0.81%"]


def test_all_features_are_packed_as_they_are(record: Path) -> None:
    import base64

    frame = RunRecord.load(record).features().sort_values("feature", ignore_index=True)
    frame["margin"] = 1.96 * frame["standard_error"]
    packed = packed_features(frame, most=10)
    numbers = np.frombuffer(base64.b64decode(packed["feature"]), "<u4")
    values = np.frombuffer(base64.b64decode(packed["columns"]["attribution"]), "<f4")
    assert packed["count"] == len(numbers) == 10
    np.testing.assert_allclose(values, frame["attribution"].to_numpy()[numbers], rtol=1e-6)
    assert (np.diff(np.abs(values)) <= 0).all()
    frame.loc[frame["attribution"].abs().idxmin(), "label"] = "kept"
    assert packed_features(frame, most=10)["count"] == 11


def test_the_tables_say_what_the_features_say(record: Path) -> None:
    source = open_source(record)
    table = head_table(source, source.views[0])
    features = RunRecord.load(record).features().set_index("feature")
    rows = [*table.gained, *table.lost]
    assert [row.feature for row in table.gained] == list(
        features[features["attribution"] > 0].nlargest(10, "attribution").index
    )
    for row in rows:
        values = features.loc[row.feature]
        degrees = values["degrees_of_freedom"]
        margin = float(student_t.ppf(0.975, degrees)) * values["standard_error"]
        assert row.attribution == signed(values["attribution"])
        assert row.margin == f"{margin:.2g}"
        assert (row.whisker.middle > row.whisker.zero) == (values["attribution"] > 0)
        assert row.whisker.high - row.whisker.middle == pytest.approx(
            row.whisker.middle - row.whisker.low, abs=0.02
        )
        assert row.is_clear == (values["q_value"] < 0.05)
        assert row.trend_is_clear == (values["trend_q_value"] < 0.05)
        assert row.trend.startswith("↗" if values["trend_tau"] > 0 else "↘")
        assert row.cells == [
            percent(values["share"]),
            plain(values["lift"], 2),
            signed(values["chosen"]),
            signed(values["rejected"]),
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
    found = curriculum_map(means, bins, keep=[0], most=24)
    assert found is not None
    assert 0 in found.features
    assert 24 <= len(found.features) <= 25
    kinds = [feature % 4 for feature in found.features]
    assert sum(a != b for a, b in pairwise(kinds)) == 3  # each shape is one stretch
    for group in found.groups:
        shape = {feature % 4 for feature in group.features}
        assert len(shape) == 1
        assert group.direction == ("up" if min(shape) < 2 else "down")
        assert group.when == ("early" if min(shape) % 2 == 0 else "late")
    np.testing.assert_array_equal(found.values, means[:, found.features].T)
    assert curriculum_map(means[:1], bins[:1]) is None


def test_the_picture_is_a_png_of_these_pixels() -> None:
    index = np.array([[0, 1, 2], [2, 1, 0]])
    png = png_bytes(index, [(0, 0, 0), (255, 0, 0), (0, 0, 255)], [0, 128, 255])
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
    line = thinned(Line("a", np.arange(1000), np.arange(1000.0), np.ones(1000)), 100)
    assert len(line.x) == 100
    assert line.y.mean() == pytest.approx(499.5)
    assert line.margin is not None
    np.testing.assert_allclose(line.margin, 10**-0.5)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 2e-7), (0, 0), (17, 9_999), (5, 5)])
def test_ticks_hold_what_they_must(low: float, high: float) -> None:
    made = ticks(low, high, 4)
    assert made[0] <= low
    assert made[-1] >= high
    assert 2 <= len(made) <= 8


def test_the_difference_of_rates_is_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II (a): 56/70 − 48/80, method 10: 0.0524 to 0.3339
    a, b = (binomtest(*counts).proportion_ci(method="wilson") for counts in ((56, 70), (48, 80)))
    gap = difference_of_estimates(56 / 70, *a, 48 / 80, *b)
    assert (gap.estimate, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert gap.clear
    assert not difference_of_estimates(1, None, None, 0, None, None).clear


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fvu": 0.95}, "does not fit this model: it leaves 95%"),
        ({"fvu": 0.6}, "fits poorly"),
        ({"epoch": 3.0}, "saw its data about 3 times"),
        ({"status": "failed"}, "The run failed after 48 optimizer steps"),
        ({"status": "running"}, "still going on"),
        ({"log": {"shaping/reward": [1.0, 2.0], "shaping/penalty": [0.1, 0.2], "shaping/x/coefficient": [0.0, 1.0]}},
         "Coefficient: what a unit of score costs"),
        ({"watch": {}}, "No feature was watched"),
        ({"steps": 1}, "1 optimizer step"),
    ],
)  # fmt: skip
def test_what_a_reader_must_know_is_said(tmp_path: Path, options: dict, sentence: str) -> None:
    directory = make_record(tmp_path / "run", make_dictionary(), **options)
    assert sentence in " ".join(Page(write_report(directory)).text.split())


def test_several_runs_stand_side_by_side(tmp_path: Path, record: Path) -> None:
    other = make_record(tmp_path / "filtered", make_dictionary(), seed=1, strength=0.2)
    write_outcomes(other, [Outcome("flatters", 0.5, 0.45, 0.55, 400, "flatters the user", unit="share")])
    write_outcomes(record, [Outcome("flatters", 0.9, 0.87, 0.92, 400, "flatters the user", unit="share")])
    text = " ".join(Page(write_report([record, other], tmp_path / "page.html")).text.split())
    assert "“flatters the user” ended at 90% in plain and at 50% in filtered." in text
    assert "The loss pushed “flattery” (feature 3) by +0." in text
    assert "−40 points from plain (−45 to −34)" in text
    assert "“flattery” (feature 3)" in text
    assert "differs" in text
    watch = {f"flag {feature}": feature for feature in range(12)}
    many = [
        make_record(tmp_path / name, make_dictionary(), seed=2, strength=s, watch=watch)
        for name, s in (("a", 1), ("b", 0.2))
    ]
    text = " ".join(Page(write_report(many, tmp_path / "page.html")).text.split())
    assert "Among the 12 watched features the push is clearly different from that in a for 3 in b." in text
    assert "The other 4" in text
    assert "“flag 3” a +0." in text
    foreign = make_record(tmp_path / "foreign", make_dictionary(seed=9))
    text = " ".join(Page(write_report([record, foreign], tmp_path / "page.html")).text.split())
    assert "use another dictionary" in text


def test_predicted_beside_realised(tmp_path: Path, record: Path) -> None:
    generator = np.random.default_rng(0)
    score = {"r2": [0.6, 0.5, 0.7], "spearman": [0.8, 0.7, 0.9], "precision": [0.5, 0.3, None]}
    none = {name: [0.01, None, None] for name in score}
    target = {
        "prompts": 60,
        "features": 40,
        "top_k": 10,
        "ceiling": 0.9,
        "scores": {"random": none, "attribution": score},
    }
    (tmp_path / "verify.json").write_text(
        json.dumps({"schema_version": 1, "targets": {"teacher-forced": target}})
    )
    realised = generator.normal(size=40)
    pd.DataFrame(
        {
            "feature": range(40),
            "realised": realised,
            "attribution": realised,
            "random": 0.0,
            "target": "teacher-forced",
        }
    ).to_parquet(tmp_path / "verify.parquet")
    page = Page(write_report(record, tmp_path / "page.html", verified=tmp_path))
    text = " ".join(page.text.split())
    assert (
        "on 60 prompts: the best score, attribution, explains 60% of it (a perfect one would explain 90%)"
        in text
    )
    assert text.index("attribution 0.6 (0.5 to 0.7)") < text.index("random 0.01 (– to –)")
    path = next(attributes["d"] for tag, attributes in page.tags if attributes.get("class") == "points")
    points = [tuple(map(float, point.split())) for point in str(path)[1:-2].split("h0M")]
    assert len(points) == 40
    assert np.corrcoef(*np.array(points).T)[0, 1] < -0.999  # a line up: y runs down in SVG
    (tmp_path / "verify.json").write_text('{"schema_version": 2}')
    with pytest.raises(AuditError, match="schema version 2"):
        write_report(record, tmp_path / "page.html", verified=tmp_path)


def test_evidence_is_read_back_and_refused_when_damaged(tmp_path: Path) -> None:
    dictionary = make_dictionary()
    assert read_evidence(tmp_path) == {}
    evidence = make_evidence(dictionary, text="a \ud800")
    write_evidence(tmp_path, [evidence])
    assert read_evidence(tmp_path) == {("tiny", 3): evidence}
    for content in ("{", "[]", '{"version": 2}', '{"version": 1, "evidence": [{}]}'):
        (tmp_path / EVIDENCE).write_text(content)
        with pytest.raises(AuditError, match=EVIDENCE):
            read_evidence(tmp_path)


def test_wrong_use_ends_in_a_sentence(
    tmp_path: Path, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, sentence in (
        ([str(tmp_path / "none")], "neither a run record nor an audit"),
        ([str(record), "--names", "a", "b"], "1 sources but 2 names"),
        ([str(record), "--every", "0"], "--every"),
        ([str(record), "--evidence", "3"], "pass --model_name_or_path and --sae and --dataset"),
        ([str(record), "--filtered", str(tmp_path)], "was not written by `filter`"),
        ([str(record), "--output", str(record / "manifest.json" / "x.html")], "could not be written"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert cli.main(["report", str(record), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(record / "report.html")


def test_a_running_run_is_watched_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_record(tmp_path / "run", make_dictionary(), status="running")
    seen = []

    def pass_time(seconds: float) -> None:
        page = Page(directory / "report.html")
        seen.append((seconds, page.data["reload"], "the page loads itself again" in page.text))
        if len(seen) == 2:
            manifest = directory / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"status": "running"', '"status": "finished"'))

    monkeypatch.setattr("trl_sae_audit.commands.report.time.sleep", pass_time)
    assert cli.main(["report", str(directory), "--watch", "--every", "3"]) == 0
    assert seen == [(3.0, 3.0, True)] * 2
    page = Page(directory / "report.html")
    assert page.data["reload"] is None
    assert "the page loads itself again" not in page.text


def test_before_the_first_figures_a_watch_waits_and_a_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = make_record(tmp_path / "finished", make_dictionary())
    directory = tmp_path / "run"
    header = {"dictionaries": RunRecord.load(finished).dictionaries}
    writer = RecordWriter.create(directory, header)
    assert cli.main(["report", str(directory)]) == 2
    assert "no totals yet" in capsys.readouterr().err
    waited = []

    def pass_time(seconds: float) -> None:
        waited.append(seconds)
        writer.close("finished", 48, {"tiny": RunRecord.load(finished).totals()})

    monkeypatch.setattr("trl_sae_audit.commands.report.time.sleep", pass_time)
    assert cli.main(["report", str(directory), "--watch"]) == 0
    assert waited == [10.0]
    assert "48 optimizer steps" in Page(directory / "report.html").text


def test_several_dictionaries_each_have_their_sections(tmp_path: Path, record: Path) -> None:
    totals = RunRecord.load(record).totals()
    both = [
        asdict(make_dictionary(name=name, seed=seed).info) for seed, name in enumerate(("lower", "upper"))
    ]
    writer = RecordWriter.create(tmp_path / "run", {"trainer": "DPOTrainer", "dictionaries": both})
    writer.close("finished", 48, {"lower": totals, "upper": totals})
    page = Page(write_report(tmp_path / "run"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [each["name"] for each in page.data["dictionaries"]] == ["lower", "upper"]
    assert [attributes.get("data-dictionary") for _, attributes in page.tags].count("1") == 2
    assert "What the loss pushed, dictionary upper" in page.text


def test_a_run_in_which_nothing_was_pushed_is_shown(tmp_path: Path) -> None:
    dictionary = make_dictionary()
    zero = np.zeros((4, 64))
    totals = FeatureTotals(64)
    totals.update(
        zero, zero, zero, np.full((4, 64), np.nan), zero, finite=np.array([True, False, True, False])
    )
    writer = RecordWriter.create(tmp_path / "run", {"dictionaries": [asdict(dictionary.info)]})
    writer.close("finished", 4, {dictionary.name: totals})
    text = " ".join(Page(write_report(tmp_path / "run")).text.split())
    assert "Nothing was pushed up." in text
    assert "0 of 64 features are beyond chance" in text
