"""What a filter writes: the same bytes twice, all of it or nothing, and never over something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk
from helpers.filters import FLAGS

from trl_sae_audit import AuditError, FlagSet, filter_preferences
from trl_sae_audit.io.manifest import read_manifest


def files_of(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in Path(directory).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_running_twice_gives_the_same_bytes(tmp_path, audit, data, kind):
    for name in ("one", "two"):
        fresh = Dataset.from_list(list(data))
        result = filter_preferences(fresh, audit, FLAGS, budget=6, control=True)
        result.save(tmp_path / name, format=kind)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert {path.name for path in (tmp_path / "one").iterdir()} >= {
        "README.md",
        "manifest.json",
        "decisions.parquet",
    }


def test_lines_that_stay_are_the_input_lines(tmp_path, audit, data):
    lines = [json.dumps(dict(row), sort_keys=True) + " " for row in data]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    result = filter_preferences(tmp_path / "data.jsonl", audit, FLAGS, budget=6)
    out = result.save(tmp_path / "out")
    kept = (out / "kept.jsonl").read_text().splitlines()
    assert kept == [line for index, line in enumerate(lines) if index in result.plan.kept]
    assert len((out / "dropped.jsonl").read_text().splitlines()) == 6


def test_the_card_replays_it(tmp_path, audit, data):
    out = filter_preferences(data, audit, FLAGS, budget=0.2, seed=5).save(tmp_path / "out")
    card = (out / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert " | words | " in rows[0]
    assert len(rows) == 2 + len(FLAGS)
    assert {row.count(" | ") for row in (rows[0], *rows[2:])} == {9}
    assert "filter --config THIS_DIRECTORY --output_dir AGAIN" in card
    assert "24 are kept and 6 dropped" in card
    assert load_from_disk(out / "kept").num_rows == 24
    config = read_manifest(out, "filtered")["config"]
    assert (config["strategy"], config["budget"], config["seed"], config["format"]) == (
        "drop",
        0.2,
        5,
        "dataset",
    )
    assert FlagSet.load(out / config["flags"]) == FLAGS


def test_what_lies_there_is_not_overwritten_unasked(tmp_path, audit, data):
    result = filter_preferences(data, audit, FLAGS, budget=6)
    result.save(tmp_path / "out")
    with pytest.raises(AuditError, match="exists already"):
        result.save(tmp_path / "out")
    filter_preferences(data, audit, FLAGS, budget=3).save(tmp_path / "out", overwrite=True)
    assert load_from_disk(tmp_path / "out" / "dropped").num_rows == 3
    (tmp_path / "mine").mkdir()
    with pytest.raises(AuditError, match="holds something else, which is not overwritten"):
        result.save(tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, audit, data):
    result = filter_preferences(data, audit, FLAGS, budget=6)
    result.save(tmp_path / "out", format="jsonl")
    before = files_of(tmp_path / "out")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = filter_preferences(data, audit, FLAGS, budget=9)
    with pytest.raises(AuditError, match="No space left on device"):
        other.save(tmp_path / "out", format="jsonl", overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_when_the_new_cannot_take_its_place_the_old_returns(tmp_path, monkeypatch, audit, data):
    filter_preferences(data, audit, FLAGS, budget=6).save(tmp_path / "out", format="jsonl")
    before = files_of(tmp_path / "out")
    replace = Path.replace

    def failing(self, target):
        if self.name.endswith(".tmp") and Path(target).name == "out":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(AuditError, match="Input/output error"):
        filter_preferences(data, audit, FLAGS, budget=9).save(
            tmp_path / "out", format="jsonl", overwrite=True
        )
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_leaves_either_nothing_or_all(tmp_path, audit, data):
    data.to_json(tmp_path / "data.jsonl")
    FLAGS.save(tmp_path / "flags.yaml")
    program = textwrap.dedent(
        """
        import os, signal, sys
        from trl_sae_audit import FlagSet, filter_preferences
        from trl_sae_audit.audit.result import Audit
        from trl_sae_audit.filtering import writers
        data, audit, flags, out, when = sys.argv[1:]
        result = filter_preferences(data, Audit.load(audit), FlagSet.load(flags), budget=6)
        write, calls = writers.JsonLines.write, []
        def dying(self, path, rows):
            calls.append(path)
            if len(calls) == int(when):
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, path, rows)
        writers.JsonLines.write = dying
        result.save(out)
        """
    )
    before = (tmp_path / "data.jsonl").read_bytes()
    for when in ("1", "2"):
        command = [
            sys.executable,
            "-c",
            program,
            tmp_path / "data.jsonl",
            audit.directory,
            tmp_path / "flags.yaml",
        ]
        done = subprocess.run([*map(str, command), str(tmp_path / "out"), when], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "data.jsonl").read_bytes() == before
    result = filter_preferences(tmp_path / "data.jsonl", audit, FLAGS, budget=6)
    out = result.save(tmp_path / "out")
    kept, dropped = ((out / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "dropped"))
    assert len(kept) + len(dropped) == 30
