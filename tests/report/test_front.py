"""The first screen: sentence, verdict and chart say what the features say; features in sentences are links."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.report_sources import make_dictionary, make_record

from trl_sae_audit.outcomes import Outcome, write_outcomes
from trl_sae_audit.report.columns import describe_columns
from trl_sae_audit.report.comparison import compare_features, compare_outcomes
from trl_sae_audit.report.curriculum import draw_curriculum_map
from trl_sae_audit.report.front import build_front, name_group
from trl_sae_audit.report.lead import DRIFT, LEADS
from trl_sae_audit.report.links import link_features
from trl_sae_audit.report.sources import open_source


def front_of(sources, about=None, labels=None):
    measures, rows = compare_outcomes(sources), compare_features(sources)
    return build_front(sources, measures, rows, about or {}, labels or {})


def test_one_run(record: Path) -> None:
    source = open_source(record)
    front = front_of([source], {5: "not at all · no; raises no"}, {5: "denial 5"})
    assert front.sentence.startswith("The loss pushed towards “flattery” (feature 3) and feature 7, and away")
    worded = front_of([source], {3: "you are right · so; raises a", 7: "as ever"}, {7: "routine 7"})
    assert "“flattery: you are right” (feature 3) and “routine: as ever” (feature 7)" in worded.sentence
    features = source.views[0].features.set_index("feature")
    assert [row.feature for row in front.rows][:5] == list(features["attribution"].nlargest(5).index)
    rows = {row.feature: row for row in front.rows}
    assert (rows[5].label, rows[5].words) == ("denial", "not at all · no")
    assert rows[3].bars[0].whisker.low > rows[3].bars[0].whisker.zero
    assert rows[3].bars[0].clear
    assert front.verdict.kind == "act"
    assert front.verdict.text.startswith("1 of 1 watched feature rise")
    group = draw_curriculum_map(
        source.views[0].over_time["attribution"].values, source.views[0].over_time["attribution"].bins
    ).groups
    named = next(name_group(source.views[0], each, {}) for each in group if each.leading[0] == 3)
    assert named.startswith("flattery")


def test_a_group_is_cut_between_words(record: Path) -> None:
    view = open_source(record).views[0]
    group = draw_curriculum_map(
        view.over_time["attribution"].values, view.over_time["attribution"].bins
    ).groups[0]
    phrases = {feature: f"many people asked number {feature} about it" for feature in group.leading}
    labels = {feature: label for label, feature in view.watched.items()}
    whole = " · ".join(labels.get(each, phrases[each]) for each in group.leading)
    named = name_group(view, group, phrases)
    assert len(whole) > len(named)
    assert named.endswith(" …")
    assert whole.startswith(named[:-2])
    assert whole[len(named) - 2] == " "


def test_a_drift_has_no_column_of_q_values() -> None:
    names = ("lead", "lead_margin", "lead_q", "attribution", "q_value")
    shown = {
        lead.name: [column["name"] for column in describe_columns(names, lead, "", "", None)]
        for lead in LEADS
    }
    assert shown[DRIFT] == ["lead", "lead_margin", "attribution", "q_value"]
    assert all("lead_q" in columns for name, columns in shown.items() if name != DRIFT)


def test_where_nothing_can_be_told_it_says_so(record: Path, tmp_path: Path) -> None:
    source = open_source(record)
    view = source.views[0]
    chance = replace(source, views=[replace(view, features=view.features.assign(q_value=0.5), watched={})])
    front = front_of([chance])
    assert (front.verdict.kind, front.sentence) == ("open", "No feature's change can be told from chance.")
    assert not any(bar.clear for row in front.rows for bar in row.bars)
    bad = open_source(make_record(tmp_path / "bad", make_dictionary(), fvu=0.95))
    assert front_of([bad]).verdict.kind == "stop"


@pytest.mark.parametrize(
    ("rate", "kind", "words"), [(0.5, "fine", "better in “flatters”"), (0.99, "act", "worse in “flatters”")]
)
def test_runs_are_judged_by_what_they_do(tmp_path: Path, rate: float, kind: str, words: str) -> None:
    sources = []
    for name, value in (("plain", 0.9), ("other", rate)):
        directory = make_record(tmp_path / name, make_dictionary())
        write_outcomes(
            directory,
            [
                Outcome(
                    "flatters", value, value - 0.02, min(1, value + 0.02), 900, wanted="down", unit="share"
                )
            ],
        )
        sources.append(open_source(directory))
    front = front_of(sources)
    assert front.verdict.kind == kind
    assert words in front.verdict.text
    assert "90%" in front.sentence
    assert [bar.source for bar in front.rows[0].bars] == [0, 1]
    for directory in ("plain", "other"):
        (tmp_path / directory / "outcomes.json").unlink()
    silent = front_of([open_source(tmp_path / name) for name in ("plain", "other")])
    assert "no clear difference" in silent.verdict.text


def test_features_in_sentences_are_links() -> None:
    text = "The rise is of “a <b> 12” and “you know” (feature 7); Feature 9, “x”."
    linked = link_features(text, {"a <b> 12": 12})
    assert '<a class="open" href="#feature-0-12">“a &lt;b&gt; 12”</a>' in linked
    assert '<a class="open" href="#feature-0-7">“you know” (feature 7)</a>; ' in linked
    assert '<a class="open" href="#feature-0-9">Feature 9</a>, “x”.' in linked
    assert "<b>" not in linked
    assert link_features("(drift +0.3 ± 0.1), q < 0.05, a < b", {}) == (
        "(drift +0.3\u00a0±\u00a00.1), q\u00a0&lt;\u00a00.05, a &lt; b"
    )
    brief = link_features(text, {}, 1, brief=True)
    assert '#feature-1-7">“you know”<span class="hide"> (feature 7)</span></a>' in brief
