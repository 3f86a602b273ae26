"""What leads a table, and that every feature that rises is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.html_page import Page
from helpers.report_sources import make_dictionary, make_record

from trl_sae_audit.cli import main as cli
from trl_sae_audit.report import page as pages
from trl_sae_audit.report import write_report
from trl_sae_audit.report.comparison import compare_features
from trl_sae_audit.report.lead import LEADS, common_lead, known_leads, read_lead
from trl_sae_audit.report.sentences import _describe_trends, describe_risen
from trl_sae_audit.report.sources import open_source
from trl_sae_audit.report.text import describe_ceiling

ATTRIBUTION = pd.DataFrame({"attribution": [0.5, -2.0], "margin": [0.1, 3.0], "q_value": [0.01, 0.5]})
SELECTION = ATTRIBUTION.assign(
    selection=[1.0, -3.0], selection_standard_error=[0.1, 1.0], selection_q_value=[0.001, 0.2]
)
PREDICTED = SELECTION.assign(
    effect_size=[0.2, np.nan], effect_size_low=[0.1, np.nan], effect_size_high=[0.3, np.nan]
)
DRIFTED = PREDICTED.assign(
    generation_effect_size=[0.5, -0.5],
    generation_drift=[5.0, -1.0],
    generation_drift_low=[4.0, -3.0],
    generation_drift_high=[7.0, 1.0],
)


def test_what_is_known_of_generations_comes_first():
    tables = (ATTRIBUTION, SELECTION, PREDICTED, DRIFTED)
    assert [known_leads(table)[0].name for table in tables] == [lead.name for lead in LEADS[::-1]]
    assert common_lead([DRIFTED, SELECTION]).name == "selection"
    assert common_lead([DRIFTED, ATTRIBUTION]).name == "attribution"
    assert known_leads(SELECTION.assign(selection=np.nan))[0].name == "attribution"


def test_effects_that_say_nothing_come_after_selection():
    mute = PREDICTED.assign(effect_size_low=[-0.1, np.nan])
    assert [lead.name for lead in known_leads(mute)] == ["selection", "effect_size", "attribution"]
    drifted = DRIFTED.assign(effect_size_low=[-0.1, np.nan])
    assert known_leads(drifted)[0].name == "generation_effect_size"


def test_an_audit_says_whether_it_predicts_or_reads_the_loss(sources):
    for table, begin in (
        (PREDICTED, "This is predicted, of one"),
        (SELECTION, "This is what the loss asks for"),
    ):
        view = replace(sources[0].views[0], features=table)
        audit = replace(sources[0], kind="audit", views=[view])
        assert _describe_trends(audit, view).startswith(begin)


def test_every_score_has_the_95_percent_interval_and_says_what_is_beyond_chance():
    found = read_lead(SELECTION, known_leads(SELECTION)[0])
    np.testing.assert_allclose(found["high"] - found["value"], 1.96 * SELECTION["selection_standard_error"])
    assert list(found["rank"]) == pytest.approx([10, 3]), "ordered in units of the standard error"
    assert list(found["clear"]) == [True, False]
    found = read_lead(PREDICTED, known_leads(PREDICTED)[0])
    assert found.iloc[0][["value", "low", "high", "q", "clear"]].tolist() == [0.2, 0.1, 0.3, 0.001, True]
    assert found["rank"][1] == -1, "what no answer shows has no rank"
    assert not found["clear"][1]
    opposed = read_lead(PREDICTED.assign(selection=[-1.0, 1.0]), known_leads(PREDICTED)[0])
    assert not opposed["clear"][0], "two kinds of evidence that contradict each other"
    found = read_lead(DRIFTED, known_leads(DRIFTED)[0])
    assert found[["low", "high"]].to_numpy() == pytest.approx(np.array([[0.4, 0.7], [-1.5, 0.5]]))
    assert list(found["clear"]) == [True, False]
    found = read_lead(ATTRIBUTION, LEADS[-1])
    assert (list(found["low"]), list(found["rank"])) == ([0.4, -5.0], [0.5, 2.0])


def with_drift(path: Path, name: str, effects: dict[int, float]):
    """A run that looked at generations: these features moved by so much, ± 0.1, the others by nothing."""
    source = open_source(path, name)
    effect = np.full(64, 1e-3)
    effect[list(effects)] = list(effects.values())
    drift = {"generation_effect_size": effect, "generation_drift": 2 * effect}
    drift |= {"generation_drift_low": 2 * effect - 0.2, "generation_drift_high": 2 * effect + 0.2}
    return replace(
        source, views=[replace(source.views[0], features=source.views[0].features.assign(**drift))]
    )


@pytest.fixture
def sources(tmp_path: Path):
    plain, shaped = (
        make_record(tmp_path / name, make_dictionary(), watch={"flattery": 3}) for name in ("plain", "shaped")
    )
    first = with_drift(plain, "plain", {3: 1.0, 20: 0.5, 30: -0.4})
    return [first, with_drift(shaped, "shaped", {3: 0.02, 20: 0.4, 40: 0.6})]


def test_all_risen_features_are_compared_those_first_that_rise_more(sources):
    rows = compare_features(sources, most=2)
    assert [row.feature for row in rows] == [3, 40, 20], (
        "watched, where pressure moved, and the others that rise"
    )
    assert [row.rises_more for row in rows] == [False, True, False]
    assert {row.lead.name for row in rows} == {"generation_effect_size"}
    value = rows[1].values[1]
    assert (value.estimate, value.low, value.high) == pytest.approx((0.6, 0.5, 0.7))
    assert value.attribution == pytest.approx(sources[1].views[0].features["attribution"][40] / 48)
    sentence = describe_risen(rows, sources, {40: "I am sure; raises of"})
    assert sentence == (
        "Rising in generations beyond chance are 2 in plain and 2 in shaped; clearly more than in plain, where pressure may have "
        "moved: feature 40, “I am sure”."
    )


def test_the_page_and_the_terminal_show_them(sources, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "open_source", lambda path, name=None: sources["shaped" in str(path)])
    paths = [str(source.directory) for source in sources]
    text = " ".join(Page(write_report(paths, tmp_path / "page.html")).text.split())
    assert "Which features rise, side by side" in text
    assert "where pressure may have moved: feature 40" in text
    assert (
        "In the model's generations of plain the largest rise is of “flattery” (feature 3) (drift +1 ± 0.1)"
        in text
    )
    assert "More in what the model generates feature drift" in text
    assert cli.main(["compare", *paths, "--top", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Which features rise: drift" in shown
    assert "1 other features rise" in shown
    assert cli.main(["compare", *paths, "--json"]) == 0
    features = json.loads(capsys.readouterr().out)["features"]
    assert {row["feature"]: row["rises_more"] for row in features if row["values"]["shaped"]["rises"]} == {
        20: False,
        40: True,
    }


@pytest.mark.parametrize(
    ("ceiling", "best", "words"),
    [
        (0.8, 0.5, "a perfect score would explain 80%"),
        (0.8, 0.85, "about all that can be told from noise on so many prompts, 80%"),
        (0.0, 0.29, "cannot be told; measure on more prompts"),
        (0.0, 0.0, "cannot be told"),
    ],
)
def test_a_verdict_never_says_less_of_a_perfect_score_than_of_a_real_one(ceiling, best, words):
    assert words in describe_ceiling(ceiling, best)
