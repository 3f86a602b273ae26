"""`trl-sae-audit compare`: the same figures in the table, in JSON and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.report_sources import make_dictionary, make_record

from trl_sae_audit import RunRecord
from trl_sae_audit.cli import main as cli
from trl_sae_audit.cli.compare import _about
from trl_sae_audit.outcomes import Outcome, write_outcomes

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    made = [
        make_record(root / "plain", make_dictionary()),
        make_record(root / "filtered", make_dictionary(), seed=1, strength=0.1, steps=24),
    ]
    rate = {"measure": "flatters", "label": "flatters the user", "unit": "share", "wanted": "down"}
    write_outcomes(
        made[0],
        [
            {**rate, "estimate": 0.4, "low": 0.3, "high": 0.5, "stage": "before"},
            {**rate, "estimate": 0.9, "low": 0.8, "high": 0.95},
        ],
    )
    write_outcomes(made[1], [{**rate, "estimate": 0.5, "low": 0.4, "high": 0.6}, Outcome("reward", 1.5)])
    return [str(path) for path in made]


@pytest.mark.parametrize(
    ("words", "lines", "expected"),
    [
        ("you know this well", 3, ["46", "you know", "this well"]),
        ("you know this well, as I said", 3, ["46", "you know", "this…"]),
        ("short", 3, ["46", "short", ""]),
        ("never seen", 1, ["46"]),
        ("never seen", 0, []),
    ],
)
def test_words_go_below_the_name_in_the_lines_of_the_other_runs(
    words: str, lines: int, expected: list[str]
) -> None:
    assert _about("46", words, lines, 9) == expected


def test_json_has_the_figures(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *runs, "--json", "--top", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["plain", "filtered"]
    flatters, reward = found["outcomes"]
    assert flatters["before"]["estimate"] == 0.4
    assert flatters["difference_from_first"]["filtered"]["estimate"] == pytest.approx(-0.4)
    assert reward["after"]["plain"] is None
    features = {row["feature"]: row for row in found["features"]}
    assert found["features"][0]["label"] == "flattery"
    assert len(features) == 3
    for name, path in zip(("plain", "filtered"), runs, strict=True):
        record = RunRecord.load(path)
        mean = record.features().set_index("feature")["attribution"] / record.last_step
        for feature, row in features.items():
            assert row["attribution"][name]["estimate"] == pytest.approx(mean[feature])


def test_the_table_fits_a_terminal(
    runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["compare", *runs, "--output", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["compare", *runs, "--names", "dpo-plain", "dpo-filtered"]) == 0
    assert capsys.readouterr().out.count(" dpo-filtered ") > 8
    table, _, path = shown.partition("The page, to open in a browser:")
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "90%" in table
    assert "−40 [−51, −26] *" in table
    assert Path(path.strip()).is_file()


def test_one_run_or_none_is_refused(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", runs[0]]) == 2
    assert "one run only" in capsys.readouterr().err
    assert cli.main(["compare", runs[0], str(Path(runs[0]).parent / "none")]) == 2
    assert "neither a run record nor an audit" in capsys.readouterr().err
