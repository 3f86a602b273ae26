"""The `config` in a manifest is enough to make the same thing again: `--config DIRECTORY`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.worlds import pairs

from trl_sae_audit import Audit, Flag, FlagSet
from trl_sae_audit.cli.main import main


@pytest.fixture(scope="module")
def made(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit with few options at their defaults, and data filtered by it."""
    root = tmp_path_factory.mktemp("replay")
    pairs(4, seed=8).to_json(root / "probe.jsonl")
    inputs = {"--model": "model", "--dataset": "pairs.jsonl", "--dictionary": "sae"}
    paths = [word for name, file in inputs.items() for word in (name, str(workspace / file))]
    loss = ["--loss_type", "sigmoid", "ipo", "--beta", "0.3", "--max_length", "40"]
    ahead = ["--lookahead", str(root / "probe.jsonl"), "--lookahead_samples", "2", "--max_new_tokens", "6"]
    how = ["--part_size", "4", "--on_bad_row", "set_aside", "--seed", "7", "--device", "cpu"]
    assert main(["audit", *paths, *loss, *ahead, *how, "--output_dir", str(root / "audit")]) == 0
    audit = Audit.load(root / "audit")
    flagged = [int(feature) for feature in audit.features()["feature"].head(2)]
    FlagSet([Flag(audit.dictionary.name, feature) for feature in flagged]).save(root / "flags.yaml")
    which = ["--strategy", "resample", "--score", '{"attribution": 1, "activation": 2}', "--quantile", "0.2"]
    files = ["--audit", str(root / "audit"), "--flags", str(root / "flags.yaml")]
    command = [
        "filter",
        "--dataset",
        str(workspace / "pairs.jsonl"),
        *files,
        *which,
        "--seed",
        "3",
        "--control",
    ]
    assert main([*command, "--output_dir", str(root / "filtered")]) == 0
    return root


def files_of(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def test_an_audit(made: Path, tmp_path: Path) -> None:
    again = ["audit", "--config", str(made / "audit"), "--output_dir"]
    assert main([*again, str(tmp_path / "same")]) == 0
    one, two = (Audit.load(path).features() for path in (made / "audit", tmp_path / "same"))
    assert one.equals(two)
    assert "predicted_change_in_generations" in one
    assert files_of(made / "audit") == files_of(tmp_path / "same")
    assert main([*again, str(tmp_path / "other"), "--beta", "0.1"]) == 0
    assert not one.equals(Audit.load(tmp_path / "other").features())


def test_a_filter_also_when_the_flags_have_changed_since(made: Path, tmp_path: Path) -> None:
    (made / "flags.yaml").unlink()
    assert main(["filter", "--config", str(made / "filtered"), "--output_dir", str(tmp_path / "same")]) == 0
    assert files_of(made / "filtered") == files_of(tmp_path / "same")
    assert 0 < len((tmp_path / "same" / "dropped.jsonl").read_text().splitlines()) < 20


def test_a_directory_of_another_kind(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "audit", tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({**manifest, "kind": "run"}))
    assert main(["audit", "--config", str(tmp_path / "run"), "--output_dir", str(tmp_path / "again")]) == 2
    assert "holds a run record, neither an audit nor filtered data" in capsys.readouterr().err
    assert main(["filter", "--config", str(made / "audit"), "--output_dir", str(tmp_path / "again")]) == 2
    assert "which is not an option of trl-sae-audit filter" in capsys.readouterr().err
