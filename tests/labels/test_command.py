"""`trl-sae-audit label`, and the labels wherever features are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.servers import Bucket, Endpoint, export_lines, serve_bucket, serve_endpoint

from trl_sae_audit import Audit, FlagSet
from trl_sae_audit.cli.main import main
from trl_sae_audit.io.feature_labels import FILE, Label, LabelScore, LabelSet


def answer(messages: list[dict[str, str]]) -> str:
    """Names everything the same, and finds it everywhere."""
    return "agrees with the user" if "Name:" in messages[-1]["content"] else "Yes"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch):
    with serve_endpoint(Endpoint(answer)) as found:
        monkeypatch.setenv("OPENAI_BASE_URL", found.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        yield found


def test_labels_by_an_endpoint(audit: Audit, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(audit.directory)
    command = ["label", where, "--labels_from", "endpoint", "--model", "small", "--features", "4"]
    assert main([*command, "--dry_run"]) == 0
    said = capsys.readouterr()
    assert not endpoint.requests
    assert "Labels: 4 requests, 0 of them answered before; about " in said.err
    assert "Scores: " in said.err
    assert main(command) == 1  # a judge that says yes to everything is at chance
    said = capsys.readouterr()
    assert "0.50 chance" in said.out
    assert "agrees with the user" in said.out
    assert "4 of 96 features of" in said.out
    assert said.out.count("fuzzing") == 2
    asked = len(endpoint.requests)
    assert main([*command, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert len(endpoint.requests) == asked
    assert document["features"][0]["text"] == "agrees with the user"
    table = Audit.load(where).features()
    assert (table["label"].head(4) == "agrees with the user").all()
    assert (table["label"] != "").sum() == 4
    assert "secret" not in (Path(where) / FILE).read_text()


def test_where_there_is_no_label_the_words_are_shown(
    audit: Audit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["label", str(audit.directory), "--features", "3", "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "has a label: --labels_from says where to get some" in said
    words = [row["words"] for row in audit.ranking().head(3).to_dict("records")]
    assert any(words)
    assert all(each[:20] in said for each in words)
    assert "detection" not in said
    assert "fuzzing" not in said
    assert "its words" in said


def test_a_judge_that_cannot_answer_is_said_to(
    audit: Audit, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.reply = lambda messages: "The description"
    command = [
        "label",
        str(audit.directory),
        "--labels_from",
        "endpoint",
        "--model",
        "mute",
        "--features",
        "2",
    ]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of these labels have no score: fewer than 5 contexts" in said


def test_labels_of_neuronpedia_are_those_of_every_feature(
    audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = audit.directory
    rows = [{"index": str(n), "description": f"thing {n}", "explanationModelName": "gpt"} for n in range(90)]
    key = "v1/tiny/1-res/explanations/batch-0.jsonl.gz"
    with serve_bucket(Bucket({key: export_lines(rows)})) as bucket:
        monkeypatch.setenv("NEURONPEDIA_EXPORTS", bucket.url)
        assert main(["label", str(where), "--labels_from", "neuronpedia", "--features", "3"]) == 0
    said = capsys.readouterr().out
    assert "90 of 96 features of" in said
    assert "have labels (neuronpedia, gpt)" in said
    table = Audit.load(where).features().set_index("feature")
    assert (table["label"] != "").sum() == 90
    assert main(["label", str(where), "--labels_from", "neuronpedia"]) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_labels_of_a_file_and_of_another_audit(
    audit: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = int(audit.features()["feature"].iloc[0])
    (tmp_path / "labels.csv").write_text(f"feature,label\n{first},flattery\n")
    assert (
        main(
            ["label", str(audit.directory), "--labels_from", "file", "--labels", str(tmp_path / "labels.csv")]
        )
        == 0
    )
    other = Audit.load(audit.directory).save(tmp_path / "other")
    (other / FILE).unlink()
    assert main(["label", str(other), "--from", "file", "--labels", str(audit.directory)]) == 0
    assert Audit.load(other).labels().text(first) == "flattery"
    capsys.readouterr()
    for words, said in (
        (["--labels_from", "file"], "--labels_from file needs --labels"),
        (["--labels", "x.csv"], "say --labels_from file"),
        (["--labels_from", "endpoint"], "--model must be given"),
        (["--model", "x"], "say --judge endpoint or --judge model"),
        (["--labels_from", "file", "--labels", str(tmp_path)], "has no labels.json"),
    ):
        assert main(["label", str(other), *words]) == 2
        assert said in capsys.readouterr().err


def test_a_flag_takes_the_label_unless_it_is_chance(
    audit: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (int(feature) for feature in audit.features()["feature"].head(2))
    score = LabelScore(0.5, 0.3, 0.7, 10, 10)
    labels = [
        Label(good, "praise", "endpoint", "gpt", detection=LabelScore(0.9, 0.7, 0.97, 10, 10)),
        Label(bad, "x", detection=score),
    ]
    LabelSet(audit.dictionary.name, audit.dictionary.identity).updated(labels).save(audit.directory)
    flags = tmp_path / "flags.yaml"
    for feature in (good, bad):
        assert main(["flag", str(audit.directory), "--feature", str(feature), "--flags", str(flags)]) == 0
    said = capsys.readouterr().out
    assert "Its label is the audit's, from endpoint by gpt; detection 0.90 [0.70, 0.97]." in said
    assert [flag.label for flag in FlagSet.load(flags)] == ["praise", ""]
