"""The report of real audits: evidence for a run, disparity beside it, and what a filter dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_sources import make_dictionary as other_dictionary
from report_sources import make_record
from test_report import Page
from worlds import make_dictionary, make_model, make_tokenizer, pairs

from trl_sae_audit import Audit, AuditError, Flag, FlagSet, RunRecord, audit_preferences, filter_preferences
from trl_sae_audit.evidence_files import read_evidence
from trl_sae_audit.report import write_report
from trl_sae_audit.report.gathering import gather_for
from trl_sae_audit.report.sources import open_source, with_audit


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    tokenizer, dictionary = make_tokenizer(), make_dictionary()
    root = tmp_path_factory.mktemp("data")
    return root, make_model(tokenizer), tokenizer, dictionary, pairs(12)


def text_of(path: Path) -> str:
    return " ".join(Page(path).text.split())


def test_a_run_gets_its_examples_and_its_disparity(world) -> None:
    root, model, tokenizer, dictionary, data = world
    run = make_record(root / "run", dictionary)
    assert "length corr." not in text_of(write_report(run)).split("What these numbers mean")[0]
    audit = gather_for(open_source(run), model, tokenizer, data, dictionary, features=2, max_rows=8)
    path = write_report(run, audit=audit)
    found = read_evidence(run)
    largest = RunRecord.load(run).features().sort_values("attribution")["feature"]
    assert {feature for _, feature in found} == {3, *largest.iloc[:2], *largest.iloc[-2:]}
    page = Page(path)
    assert "length corr. disparity" in " ".join(page.text.split())
    joined = with_audit(open_source(run), open_source(audit)).views[0].features.set_index("feature")
    own = Audit.load(audit).features().set_index("feature").loc[joined.index]
    for column in ("disparity", "length_correlation"):
        assert joined[column].to_numpy() == pytest.approx(own[column].to_numpy(), nan_ok=True)
    assert joined["length_correlation"].nunique() > 2
    card = page.data["dictionaries"][0]["evidence"]["3"]
    evidence = found[(dictionary.name, 3)]
    assert card["promotes"] == evidence.promotes
    answer = card["examples"][0]["answers"][0]
    assert answer["tokens"] == [token.text for token in evidence.examples[0].tokens["chosen"]]
    again = gather_for(open_source(run), model, tokenizer, data, dictionary, features=1, max_rows=8)
    assert again == audit


def test_evidence_needs_the_same_dictionary(world, tmp_path: Path) -> None:
    _, model, tokenizer, dictionary, data = world
    run = make_record(tmp_path / "run", other_dictionary())
    with pytest.raises(AuditError, match="pass the same one"):
        gather_for(open_source(run), model, tokenizer, data, dictionary)


def test_an_audit_and_what_was_filtered_by_it(world) -> None:
    root, model, tokenizer, dictionary, data = world
    audit = audit_preferences(model, tokenizer, data, dictionary, output_dir=root / "audit", progress=False)
    features = audit.features()
    flag = Flag(dictionary.name, int(features["feature"].iloc[0]), "suspect")
    result = filter_preferences(data, audit, FlagSet([flag]), budget=2)
    directory = result.save(root / "filtered", format="jsonl")
    page = Page(write_report(root / "audit", filtered=directory))
    text = " ".join(page.text.split())
    assert "Audit before training (dpo) of 12 examples" in text
    assert "Trained on, these examples would push hardest" in text
    assert f"{(features['q_value'] < 0.05).sum()} of {len(features)} features are beyond chance" in text
    assert "12 rows" in text
    for row in result.dropped:
        assert f"Row {row['audit_row']}, score" in text
        assert row["audit_reason"] in text
        assert row["chosen"] in text
    assert page.data["dictionaries"][0]["map"] is None
    foreign = make_record(root / "foreign", other_dictionary())
    with pytest.raises(AuditError, match="does not have"):
        write_report(foreign, audit=root / "audit")
