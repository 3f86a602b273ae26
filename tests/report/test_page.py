"""The report says what the record says, loads nothing, and shows what others wrote as text."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
from helpers.html_page import Page
from helpers.report_sources import HOSTILE, make_dictionary, make_evidence, make_record

from trl_sae_audit import AuditError, RunRecord
from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.audit.evidence_files import FILE as EVIDENCE
from trl_sae_audit.audit.evidence_files import read_evidence, write_evidence
from trl_sae_audit.cli import main as cli
from trl_sae_audit.io.manifest import StoredFile, write_manifest
from trl_sae_audit.outcomes import Outcome, write_outcomes
from trl_sae_audit.record.writer import RecordWriter
from trl_sae_audit.report import write_report
from trl_sae_audit.report.packing import encode_json
from trl_sae_audit.report.text import format_signed
from trl_sae_audit.text import sanitize_excerpt


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
    assert f"hardest towards “flattery” (feature 3), with {up['lift']:.2g} times a random direction" in text
    assert f"hardest away from feature 5, with {down['lift']:.2g} times a random direction" in text
    significant = int((features["q_value"] < 0.05).sum())
    assert f"{significant} of 64 features are beyond chance" in text
    assert "span 60% of its gradient, 4 random directions 25%" in text
    assert "“flatters the user” (less is better) went from 40% to 90% in plain" in text
    assert format_signed(up["attribution"]) in text
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


def test_half_a_character_in_a_side_s_name_is_shown_by_its_number(record: Path, tmp_path: Path) -> None:
    manifest = record / "manifest.json"
    written = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(written | {"sides": ["chosen\ud800", "rejected"]}))
    page = write_report(record, tmp_path / "page.html")
    assert "chosen⟨U+D800⟩" in page.read_text(encoding="utf-8")


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
    context = page.data["dictionaries"][0]["evidence"]["3"]["contexts"][0]
    assert "⟨U+202E⟩" in context["at"]


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
    assert sanitize_excerpt(text, 10 if text.startswith("xx") else 2000) == expected


def test_data_in_a_script_cannot_leave_it() -> None:
    text = encode_json({"a": "</script><!--&\u2028\ud800"})
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!--&\u2028\ud800"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fvu": 0.95}, "does not fit this model: it leaves 95%"),
        ({"fvu": 0.6}, "fits poorly"),
        ({"epoch": 3.0}, "saw its data about 3 times"),
        ({"status": "failed"}, "The run failed after 48 optimizer steps"),
        ({"status": "running"}, "still going, or"),
        ({"log": {"shaping/reward": [1.0, 2.0], "shaping/penalty": [0.1, 0.2], "shaping/x/coefficient": [0.0, 1.0]}},
         "Coefficient: penalty per unit of score"),
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
    assert "do not use the dictionary of" in text


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
    measured = generator.normal(size=40)
    pd.DataFrame(
        {
            "feature": range(40),
            "measured": measured,
            "attribution": measured,
            "random": 0.0,
            "target": "on given text",
        }
    ).to_parquet(tmp_path / "verify.parquet")
    stored = [StoredFile.on_disk(tmp_path, "verify.parquet")]
    write_manifest(tmp_path, "verification", {"targets": {"on given text": target}}, stored)
    page = Page(write_report(record, tmp_path / "page.html", verified=tmp_path))
    text = " ".join(page.text.split())
    assert (
        "on 60 prompts: the best score, attribution, explains 60% of it (a perfect score would explain 90%)"
        in text
    )
    assert text.index("attribution 0.6 (0.5 to 0.7)") < text.index("random 0.01 (– to –)")
    path = next(attributes["d"] for tag, attributes in page.tags if attributes.get("class") == "points")
    points = [tuple(map(float, point.split())) for point in str(path)[1:-2].split("h0M")]
    assert len(points) == 40
    assert np.corrcoef(*np.array(points).T)[0, 1] < -0.999  # a line up: y runs down in SVG
    target["scores"] = {"attribution": {**score, "r2": [None, None, None]}}
    write_manifest(tmp_path, "verification", {"targets": {"on given text": target}}, stored)
    unknown = Page(write_report(record, tmp_path / "page.html", verified=tmp_path))
    assert "on 60 prompts: how much of it a score explains cannot be said" in " ".join(unknown.text.split())
    (tmp_path / "manifest.json").write_text('{"kind": "verification", "format": 2}')
    with pytest.raises(AuditError, match="a verification of format 2"):
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
        ([str(record), "--evidence", "3"], "pass --model, --dictionary and --dataset"),
        ([str(record), "--filtered", str(tmp_path)], "is not filtered data"),
        ([str(record), "--output", str(record / "manifest.json" / "x.html")], "could not be written"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert cli.main(["report", str(record), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(record / "report.html")


def test_a_running_run_is_watched_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make_record(tmp_path / "run", make_dictionary(), status="running")
    seen = []

    def pass_time(seconds: float) -> None:
        page = Page(directory / "report.html")
        seen.append((seconds, page.data["reload"], "the page reloads every" in page.text))
        if len(seen) == 2:
            manifest = directory / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"status": "running"', '"status": "finished"'))

    monkeypatch.setattr("trl_sae_audit.cli.report.time.sleep", pass_time)
    assert cli.main(["report", str(directory), "--watch", "--every", "3"]) == 0
    assert seen == [(3.0, 3.0, True)] * 2
    address = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", capsys.readouterr().out)
    assert address is not None
    with pytest.raises(OSError, match="refused"):  # it has ended with the run
        urlopen(address[0])
    page = Page(directory / "report.html")
    assert page.data["reload"] is None
    assert "the page reloads every" not in page.text


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

    monkeypatch.setattr("trl_sae_audit.cli.report.time.sleep", pass_time)
    assert cli.main(["report", str(directory), "--watch"]) == 0
    assert waited == [10.0]
    assert "48 optimizer steps" in Page(directory / "report.html").text


def test_a_watch_ends_with_the_keyboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_sae_audit.cli.report.time.sleep", interrupt)
    directory = make_record(tmp_path / "run", make_dictionary(), status="running")
    assert cli.main(["report", str(directory), "--watch"]) == 0
    assert str(directory / "report.html") in capsys.readouterr().out.replace("\n", "")
    empty = tmp_path / "empty"
    RecordWriter.create(empty, {"dictionaries": RunRecord.load(directory).dictionaries})
    assert cli.main(["report", str(empty), "--watch"]) == 0
    assert "no figures yet" in capsys.readouterr().out


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
