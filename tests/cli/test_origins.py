"""What an artefact knows need not be given: the options of verify and diff out of a run's record or an audit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.hostile.inputs import write_audit, write_record, write_verified

from trl_sae_audit import AuditError
from trl_sae_audit.cli import diff, verify
from trl_sae_audit.cli import main as cli
from trl_sae_audit.cli.origins import ROWS_OF_A_RUN, origins
from trl_sae_audit.cli.parser import parse_options

ORIGINS = {
    "model": "/m",
    "after": "/t",
    "dataset": "/p.jsonl",
    "dictionaries": {"tiny": {"dictionary": "/sae", "hook_point": "model.layers.1"}},
}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    write_record(tmp_path)
    _configure(tmp_path, origins=ORIGINS)
    return tmp_path


def _configure(directory: Path, **options: object) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["config"] = {**manifest.get("config", {}), **options}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_a_record_knows_models_dictionary_and_data(record: Path) -> None:
    assert origins(record) == {
        "model": "/m",
        "after": "/t",
        "dataset": "/p.jsonl",
        "max_rows": ROWS_OF_A_RUN,
        "dictionary": "/sae",
        "hook_point": "model.layers.1",
    }
    arguments, model, data, dictionary, _ = parse_options(
        "verify", "", "", verify.OPTIONS, [str(record)], **verify.KNOWN
    )
    assert (arguments.after, model.model, data.dataset, data.max_rows) == (
        "/t",
        "/m",
        "/p.jsonl",
        ROWS_OF_A_RUN,
    )
    assert (dictionary.dictionary, dictionary.hook_point) == ("/sae", "model.layers.1")
    arguments, dictionary, _ = parse_options("diff", "", "", diff.OPTIONS, [str(record)], **diff.KNOWN)
    assert (arguments.after, arguments.dataset, dictionary.dictionary) == ("/t", "/p.jsonl", "/sae")


def test_what_is_given_wins(record: Path) -> None:
    words = [str(record), "--model", "other", "--dataset", "held_out.jsonl", "--dictionary", "mine"]
    _, model, data, dictionary, _ = parse_options("verify", "", "", verify.OPTIONS, words, **verify.KNOWN)
    assert (model.model, data.dataset, data.max_rows) == ("other", "held_out.jsonl", None)
    assert (dictionary.dictionary, dictionary.hook_point) == ("mine", None)


def test_an_audit_knows_all_but_the_model_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audit(tmp_path)
    _configure(tmp_path, model="/m", dataset="/p.jsonl", dictionary="/sae", split=None, beta=0.1)
    assert origins(tmp_path) == {"model": "/m", "dataset": "/p.jsonl", "dictionary": "/sae"}
    assert cli.main(["verify", str(tmp_path)]) == cli.USAGE_ERROR
    assert "--after must be given" in capsys.readouterr().err


def test_where_nothing_is_known_it_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path)  # made in Python, of a model and data in memory
    assert cli.main(["verify", str(tmp_path)]) == cli.USAGE_ERROR
    assert "--after, --model, --dataset must be given" in capsys.readouterr().err
    assert cli.main(["diff", "model"]) == cli.USAGE_ERROR
    assert "AFTER, --dataset must be given" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    write_verified(tmp_path / "other")
    with pytest.raises(AuditError, match="holds a verification, neither a run record nor an audit"):
        origins(tmp_path / "other")
