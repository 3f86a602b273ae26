"""A record grows by whole flushes, belongs to one writer, and is resumed as if it had never stopped."""

import itertools
import os

import numpy as np
import pyarrow as pa
import pytest
from helpers.records import (
    HEADER,
    OTHER,
    F,
    assert_consistent,
    files_in,
    named_in,
    parts_in,
    take_step,
    write_steps,
)

from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.errors import AuditError
from trl_sae_audit.io.manifest import MANIFEST
from trl_sae_audit.record import writer as record_writer
from trl_sae_audit.record.reader import RunRecord
from trl_sae_audit.record.writer import RecordWriter


def test_columns_may_come_late_and_types_may_widen_but_not_change(tmp_path):
    writer = RecordWriter.create(tmp_path, HEADER)
    totals = {"mine": FeatureTotals(F)}
    writer.append("health", {"step": [1], "fvu": [0], "label": [None]})
    writer.flush(1, totals)
    writer.append("health", pa.table({"step": [2], "fvu": [0.5], "label": ["x"], "late": [7]}))
    writer.flush(2, totals)
    table = RunRecord.load(tmp_path).table("health")
    assert table["fvu"].tolist() == [0, 0.5]
    assert table["late"].isna().tolist() == [True, False]
    with pytest.raises(AuditError, match="keep each column's type"):
        writer.append("health", {"step": [3], "fvu": ["high"]})
    writer.close()
    writer = RecordWriter.resume(tmp_path, HEADER, 2)
    with pytest.raises(AuditError, match="keep each column's type"):
        writer.append("health", {"step": [3], "fvu": ["high"]})


def test_the_number_of_parts_stays_logarithmic(tmp_path):
    writer = RecordWriter.create(tmp_path, HEADER)
    write_steps(writer, FeatureTotals(F), range(1, 41))
    record = RunRecord.load(tmp_path)
    sizes = [part["rows"] for part in parts_in(record.manifest, "steps")]
    assert sum(sizes) == 40 * F
    assert all(earlier > 2 * later for earlier, later in itertools.pairwise(sizes))
    assert files_in(tmp_path) == named_in(record) | {MANIFEST}
    assert_consistent(record)


def test_a_full_part_is_left_as_it_is(tmp_path, monkeypatch):
    """So what a flush reads and writes does not grow with the run."""
    monkeypatch.setattr(record_writer, "_FULL_PART", 4 * F)
    writer = RecordWriter.create(tmp_path, HEADER)
    totals = write_steps(writer, FeatureTotals(F), range(1, 20))
    first = parts_in(RunRecord.load(tmp_path).manifest, "steps")
    write_steps(writer, totals, range(20, 41))
    record = RunRecord.load(tmp_path)
    parts = parts_in(record.manifest, "steps")
    assert max(part["rows"] for part in parts) <= 8 * F
    assert parts[:2] == first[:2]
    assert len(parts) <= 40 // 4 + 3
    assert_consistent(record)


def test_extra_stays_until_it_is_replaced(tmp_path):
    writer = RecordWriter.create(tmp_path, HEADER)
    totals = {"mine": FeatureTotals(F)}
    writer.flush(1, totals, extra={"a": np.float32(0.5)})
    writer.flush(2, totals)
    assert RunRecord.load(tmp_path).manifest["extra"] == {"a": 0.5}


def test_another_runs_record_is_not_overwritten(written):
    with pytest.raises(AuditError, match="holds the record of another run"):
        RecordWriter.create(written, HEADER)
    assert_consistent(RunRecord.load(written))


def test_a_second_writer_is_refused_in_the_same_process(tmp_path):
    writer = RecordWriter.create(tmp_path, HEADER)
    with pytest.raises(AuditError, match="another writer"):
        RecordWriter.create(tmp_path, HEADER)
    with pytest.raises(AuditError, match="another writer"):
        RecordWriter.resume(tmp_path, HEADER, 0)
    writer.close()
    RecordWriter.resume(tmp_path, HEADER, 0).close()


def test_a_forgotten_writer_does_not_keep_the_lock(tmp_path):
    RecordWriter.create(tmp_path, HEADER)
    RecordWriter.resume(tmp_path, HEADER, 0)


def test_a_failed_attempt_gives_the_lock_back(written):
    for _ in range(2):
        with pytest.raises(AuditError, match="ends at step 7, before step 9"):
            RecordWriter.resume(written, HEADER, 9)


def test_foreign_directories_and_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(AuditError, match="not empty and holds no run record"):
        RecordWriter.create(tmp_path, HEADER)
    with pytest.raises(AuditError, match="is a file"):
        RecordWriter.create(tmp_path / "thesis.tex", HEADER)
    with pytest.raises(AuditError, match="cannot be written"):
        RecordWriter.create(tmp_path / "thesis.tex" / "run", HEADER)
    with pytest.raises(AuditError, match=r"no manifest\.json"):
        RecordWriter.resume(tmp_path, HEADER, 0)
    assert files_in(tmp_path) == {"thesis.tex"}
    assert not (tmp_path / ".lock").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    for directory in (tmp_path, tmp_path / "run"):
        with pytest.raises(AuditError, match="cannot be written"):
            RecordWriter.create(directory, HEADER)


def test_a_directory_that_cannot_be_made_is_refused():
    with pytest.raises(AuditError, match="cannot be written"):
        RecordWriter.create("/proc/trl-sae-audit/run", HEADER)


def test_a_creation_killed_before_its_manifest_can_be_repeated(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "manifest.json.tmp").write_text("{")
    RecordWriter.create(tmp_path, HEADER).close()
    assert files_in(tmp_path) == {MANIFEST}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dictionaries": []}, "dictionaries: List should have at least 1"),
        ({"dictionaries": [{"name": "mine"}]}, r"dictionaries\.0\.identity: Field required"),
        ({"dictionaries": HEADER["dictionaries"] * 2}, "same name"),
        ({"config": {"watch": {"nobody": {"x": 1}}}}, "watched in 'nobody'"),
        ({"config": {"watch": {"sycophancy": 1}}}, r"config\.watch\.sycophancy"),
        ({"status": "running"}, r"\['status'\]"),
    ],
)
def test_an_incomplete_header_is_refused(tmp_path, change, message):
    with pytest.raises(AuditError, match=message):
        RecordWriter.create(tmp_path / "run", HEADER | change)
    assert not (tmp_path / "run").exists()


def test_rows_that_make_no_table_are_refused(tmp_path):
    writer = RecordWriter.create(tmp_path, HEADER)
    totals = {"mine": FeatureTotals(F)}
    with pytest.raises(AuditError, match="lack an integer column 'step'"):
        writer.append("steps", {"feature": [1]})
    with pytest.raises(AuditError, match="do not form a table"):
        writer.append("steps", {"step": [1, 2], "feature": [1]})
    with pytest.raises(AuditError, match="cannot name a table"):
        writer.append("../steps", {"step": [1]})
    writer.append("steps", {"step": [3]})
    with pytest.raises(AuditError, match="rows of step 3"):
        writer.flush(2, totals)
    writer.flush(3, totals)
    with pytest.raises(AuditError, match="beyond step 2"):
        writer.flush(2, totals)


def test_closing_twice_is_harmless_and_writing_after_it_is_not(tmp_path):
    writer = RecordWriter.create(tmp_path, HEADER)
    totals = write_steps(writer, FeatureTotals(F), range(1, 4))
    take_step(writer, totals, 4)
    with pytest.raises(AuditError, match="cannot end as 'running'"):
        writer.close("running")
    writer.close("failed")
    writer.close("finished")
    record = RunRecord.load(tmp_path)
    assert (record.status, record.last_step) == ("failed", 3)
    assert_consistent(record)
    with pytest.raises(AuditError, match="is closed"):
        writer.flush(4, {"mine": totals})
    with pytest.raises(AuditError, match="is closed"):
        writer.append("steps", {"step": [5]})


@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_a_resumed_run_ends_as_if_never_stopped(tmp_path, written, at):
    totals = write_steps(RecordWriter.create(tmp_path / "other", HEADER), FeatureTotals(F), range(1, at + 1))
    writer = RecordWriter.resume(written, HEADER, at, {"mine": totals})
    record = RunRecord.load(written)
    assert (record.status, record.last_step) == ("running", at)
    assert_consistent(record)
    write_steps(writer, totals, range(at + 1, 11), every=2)
    writer.close("finished", 10, {"mine": totals})
    record = RunRecord.load(written)
    assert_consistent(record)
    assert [note["step"] for note in record.manifest["resumed"]] == [at]
    never_stopped = FeatureTotals(F)
    write_steps(RecordWriter.create(tmp_path / "whole", HEADER), never_stopped, range(1, 11))
    found, expected = record.totals().state_dict(), never_stopped.state_dict()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_totals_may_be_left_out_where_the_record_has_them(written):
    with pytest.raises(AuditError, match="pass the totals the checkpoint was saved with"):
        RecordWriter.resume(written, HEADER, 3)
    RecordWriter.resume(written, HEADER, 7).close()
    assert_consistent(RunRecord.load(written))
    RecordWriter.resume(written, HEADER, 0).close()
    record = RunRecord.load(written)
    assert_consistent(record)
    assert record.last_step == 0
    assert files_in(written) == {MANIFEST}


@pytest.mark.parametrize(
    ("key", "value"),
    [("identity", "sha256:9"), ("hook_point", "model.layers.9"), ("d_model", 9), ("name", "yours")],
)
def test_another_dictionary_cannot_continue_a_record(written, key, value):
    header = HEADER | {"dictionaries": [HEADER["dictionaries"][0] | {key: value}], "config": {}}
    with pytest.raises(AuditError, match=f"{key} .* then, {value!r} now"):
        RecordWriter.resume(written, header, 7)
    with pytest.raises(AuditError, match="1 then, 2 now"):
        RecordWriter.resume(written, HEADER | {"dictionaries": [*HEADER["dictionaries"], OTHER]}, 7)


def test_resuming_clears_what_a_killed_writer_left(written):
    (written / "steps" / "000099-0.parquet").write_text("half")
    (written / "totals" / "000099-0.safetensors.tmp").write_text("half")
    (written / "steps" / "notes.txt").write_text("mine")
    RecordWriter.resume(written, HEADER, 7)
    assert files_in(written) == named_in(RunRecord.load(written)) | {MANIFEST, "steps/notes.txt"}
