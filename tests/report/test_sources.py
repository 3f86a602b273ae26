"""The report of real audits: evidence for a run, disparity beside it, and what a filter dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.html_page import Page
from helpers.report_sources import make_dictionary as other_dictionary
from helpers.report_sources import make_record
from helpers.worlds import pairs

from trl_sae_audit import Audit, AuditError, Flag, FlagSet, RunRecord, audit_preferences, filter_preferences
from trl_sae_audit.audit.evidence_files import read_evidence
from trl_sae_audit.cli.gathering import gather_for
from trl_sae_audit.report import write_report
from trl_sae_audit.report.sources import add_audit, open_source

DATA = pairs(12)


def text_of(path: Path) -> str:
    return " ".join(Page(path).text.split())


def test_a_run_gets_its_examples_and_its_disparity(tmp_path: Path, model, tokenizer, dictionary) -> None:
    run = make_record(tmp_path / "run", dictionary)
    assert "length corr." not in text_of(write_report(run)).rsplit("What the columns mean", 1)[0]
    audit = gather_for(open_source(run), model, tokenizer, DATA.select(range(8)), dictionary, features=2)
    path = write_report(run, audit=audit)
    found = read_evidence(run)
    largest = RunRecord.load(run).features().sort_values("attribution")["feature"]
    assert {feature for _, feature in found} == {3, *largest.iloc[:2], *largest.iloc[-2:]}
    page = Page(path)
    assert "q disparity share lift chosen rejected length corr. trend" in " ".join(page.text.split())
    joined = add_audit(open_source(run), open_source(audit)).views[0].features.set_index("feature")
    own = Audit.load(audit).features().set_index("feature").loc[joined.index]
    for column in ("disparity", "length_correlation"):
        assert joined[column].to_numpy() == pytest.approx(own[column].to_numpy(), nan_ok=True)
    assert joined["length_correlation"].nunique() > 2
    card = page.data["dictionaries"][0]["evidence"]["3"]
    evidence = found[(dictionary.name, 3)]
    assert card["promotes"] == evidence.promotes
    own = Audit.load(audit).contexts([3])
    assert [context["at"] for context in card["contexts"]] == own["at"].tolist()
    assert [context.before for context in evidence.contexts] == own["before"].tolist()
    assert card["words"] == evidence.words
    assert card["density"] > 0
    again = gather_for(open_source(run), model, tokenizer, DATA.select(range(8)), dictionary, features=1)
    assert again == audit


def test_evidence_needs_the_same_dictionary(tmp_path: Path, model, tokenizer, dictionary) -> None:
    run = make_record(tmp_path / "run", other_dictionary())
    with pytest.raises(AuditError, match="pass the same one"):
        gather_for(open_source(run), model, tokenizer, DATA, dictionary)


def test_an_audit_and_what_was_filtered_by_it(tmp_path: Path, model, tokenizer, dictionary) -> None:
    audit = audit_preferences(
        model, tokenizer, DATA, dictionary, output_dir=tmp_path / "audit", lookahead=None, progress=False
    )
    features = audit.features()
    flag = Flag(dictionary.name, int(features["feature"].iloc[0]), "suspect")
    result = filter_preferences(DATA, audit, FlagSet([flag]), score="attribution", weights="flags", budget=2)
    directory = result.save(tmp_path / "filtered", format="jsonl")
    page = Page(write_report(tmp_path / "audit", filtered=directory))
    text = " ".join(page.text.split())
    assert "Audit before training (dpo) of 12 examples" in text
    assert (
        f"The data selected most for feature {features[features['selection'] > 0]['feature'].iloc[0]}" in text
    )
    assert (
        f"{(features['selection_q_value'] < 0.05).sum()} of {len(features)} features are beyond chance"
        in text
    )
    assert "too few pairs to tell; audit more" in text
    assert "disparity before disparity after attribution before" in text
    assert "12 rows" in text
    for row in result.dropped:
        assert f"Row {row['audit_row']}, score" in text
        assert row["audit_reason"] in text
        assert row["chosen"] in text
    assert page.data["dictionaries"][0]["maps"] == {}
    foreign = make_record(tmp_path / "foreign", other_dictionary())
    with pytest.raises(AuditError, match="does not use"):
        write_report(foreign, audit=tmp_path / "audit")
