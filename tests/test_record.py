"""A run record is readable whatever happens to the run that writes it, and refuses what it cannot vouch for."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trl_sae_audit import record as record_reader
from trl_sae_audit import record_files, record_writer
from trl_sae_audit.errors import AuditError
from trl_sae_audit.record import RunRecord
from trl_sae_audit.record_files import load_totals, save_totals
from trl_sae_audit.record_manifest import MANIFEST, read_manifest
from trl_sae_audit.record_writer import RecordWriter
from trl_sae_audit.totals import FeatureTotals

F = 5
HEADER = {
    "trainer": "DPOTrainer",
    "model": "tiny",
    "dictionaries": [
        {"name": "mine", "identity": "sha256:1", "hook_point": "model.layers.1", "d_sae": F, "d_model": 8}
    ],
    "arguments": {
        "learning_rate": 5e-6,
        "optim": Path("adamw"),
        "max_grad_norm": float("inf"),
        "seed": np.int64(3),
    },
    "watch": {"mine": {"sycophancy": 2}},
}
OTHER = {"name": "other", "identity": "sha256:2", "hook_point": "model.layers.2", "d_sae": F, "d_model": 8}


def values_of(step):
    return np.random.default_rng(step).integers(-9, 10, (1, F)).astype(np.float32)


def take_step(writer, totals, step):
    """One optimizer step: a row a feature, and the totals of the same values."""
    values = values_of(step)
    totals.update(values, values, 0 * values, np.abs(values), np.abs(values) / 10)
    rows = {"step": [step] * F, "dictionary": ["mine"] * F, "feature": range(F), "attribution": values[0]}
    writer.append("steps", rows)


def write_steps(writer, totals, steps, every=1):
    for step in steps:
        take_step(writer, totals, step)
        if step % every == 0:
            writer.flush(step, {"mine": totals})
    return totals


def assert_consistent(record):
    """Rows and totals cover exactly the steps up to last_step, and agree."""
    expected = sum((values_of(step)[0] for step in range(1, record.last_step + 1)), np.zeros(F))
    if record.last_step == 0:
        assert "steps" not in record.manifest["tables"]
        return
    rows = record.steps("mine")
    assert sorted(rows["step"].unique()) == list(range(1, record.last_step + 1))
    assert len(rows) == F * record.last_step
    np.testing.assert_array_equal(rows.groupby("feature")["attribution"].sum(), expected)
    assert record.totals().steps == record.last_step
    np.testing.assert_array_equal(record.totals().sums["attribution"], expected)


def files_in(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {".lock"}


def named_in(record):
    return {entry["file"] for parts in record.manifest["tables"].values() for entry in parts} | {
        entry["file"] for entry in record.manifest["totals"].values()
    }


@pytest.fixture
def written(tmp_path):
    """A finished record of seven steps."""
    writer = RecordWriter.create(tmp_path / "run", HEADER)
    totals = write_steps(writer, FeatureTotals(F), range(1, 8))
    writer.close("finished", 7, {"mine": totals})
    return tmp_path / "run"


def edit_manifest(directory, change):
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


# What was written is what is read


def test_a_record_reads_back(written):
    record = RunRecord.load(written)
    assert (record.status, record.last_step) == ("finished", 7)
    assert record.manifest["arguments"] == {
        "learning_rate": 5e-6,
        "optim": "adamw",
        "max_grad_norm": "inf",
        "seed": 3,
    }
    assert record.manifest["schema_version"] == 1
    assert "torch" in record.manifest["versions"]
    assert record.dictionaries == HEADER["dictionaries"]
    assert_consistent(record)


def test_features_are_ranked_and_labelled(written):
    record = RunRecord.load(str(written))
    features = record.features()
    assert features["attribution"].abs().is_monotonic_decreasing
    assert sorted(features["feature"]) == list(range(F))
    assert features.loc[features["feature"] == 2, "label"].item() == "sycophancy"
    assert (features.loc[features["feature"] != 2, "label"] == "").all()
    assert (features["dictionary"] == "mine").all()
    np.testing.assert_allclose(features["lift"], 8 * features["share"])
    expected = record.totals().frame(8).set_index("feature")
    np.testing.assert_array_equal(features["q_value"], expected.loc[features["feature"], "q_value"])


def test_curriculum_has_a_row_a_bin(written):
    curriculum = RunRecord.load(written).curriculum()
    assert curriculum.index.tolist() == [(step, step) for step in range(1, 8)]
    np.testing.assert_array_equal(curriculum.loc[(3, 3)], values_of(3)[0])


def test_several_dictionaries_are_told_apart(tmp_path):
    header = HEADER | {"dictionaries": [*HEADER["dictionaries"], OTHER]}
    writer = RecordWriter.create(tmp_path, header)
    mine, other = FeatureTotals(F), FeatureTotals(F)
    take_step(writer, mine, 1)
    writer.append("steps", {"step": [1], "dictionary": ["other"], "feature": [0], "attribution": [1.0]})
    other.update(*[np.ones((1, F), np.float32)] * 5)
    writer.flush(1, {"mine": mine, "other": other})
    record = RunRecord.load(tmp_path)
    assert len(record.steps()) == F + 1
    assert record.steps("other")["attribution"].tolist() == [1.0]
    assert len(record.features()) == 2 * F
    assert set(record.features("other")["dictionary"]) == {"other"}
    assert record.totals("other").sums["attribution"].tolist() == [1.0] * F
    with pytest.raises(AuditError, match=r"several dictionaries: name one of \['mine', 'other'\]"):
        record.curriculum()
    with pytest.raises(AuditError, match="no dictionary 'nobody'"):
        record.features("nobody")
    with pytest.raises(AuditError, match="every dictionary"):
        writer.flush(2, {"mine": mine})


def test_a_record_without_a_flush_says_so(tmp_path):
    RecordWriter.create(tmp_path, HEADER).close("failed")
    record = RunRecord.load(tmp_path)
    assert (record.status, record.last_step) == ("failed", 0)
    with pytest.raises(AuditError, match="first flush"):
        record.features()
    with pytest.raises(AuditError, match="no table 'steps'"):
        record.steps()


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
    sizes = [part["rows"] for part in record.manifest["tables"]["steps"]]
    assert sum(sizes) == 40 * F
    assert all(earlier > 2 * later for earlier, later in itertools.pairwise(sizes))
    assert files_in(tmp_path) == named_in(record) | {MANIFEST}
    assert_consistent(record)


def test_a_full_part_is_left_as_it_is(tmp_path, monkeypatch):
    """So what a flush reads and writes does not grow with the run."""
    monkeypatch.setattr(record_writer, "_FULL_PART", 4 * F)
    writer = RecordWriter.create(tmp_path, HEADER)
    totals = write_steps(writer, FeatureTotals(F), range(1, 20))
    first = RunRecord.load(tmp_path).manifest["tables"]["steps"]
    write_steps(writer, totals, range(20, 41))
    record = RunRecord.load(tmp_path)
    parts = record.manifest["tables"]["steps"]
    assert max(part["rows"] for part in parts) <= 8 * F
    assert parts[:2] == first[:2]
    assert len(parts) <= 40 // 4 + 3
    assert_consistent(record)


def test_extra_stays_until_it_is_replaced(tmp_path):
    writer = RecordWriter.create(tmp_path, HEADER)
    totals = {"mine": FeatureTotals(F)}
    writer.flush(1, totals, extra={"a": np.float32(0.5)})
    writer.flush(2, totals)
    assert writer.extra == RunRecord.load(tmp_path).manifest["extra"] == {"a": 0.5}


def test_totals_survive_a_file_of_their_own(tmp_path, written):
    totals = RunRecord.load(written).totals()
    save_totals(tmp_path / "totals.safetensors", totals)
    again = load_totals(tmp_path / "totals.safetensors")
    assert again.frame(8).equals(totals.frame(8))
    (tmp_path / "totals.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(AuditError, match="not a readable file of totals"):
        load_totals(tmp_path / "totals.safetensors")
    with pytest.raises(AuditError, match="cannot be read"):
        load_totals(tmp_path / "nothing.safetensors")


# Who may write


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
        ({"dictionaries": []}, "names no dictionaries"),
        ({"dictionaries": [{"name": "mine"}]}, "has no 'identity'"),
        ({"dictionaries": HEADER["dictionaries"] * 2}, "same name"),
        ({"watch": {"nobody": {"x": 1}}}, "watch in the run's header"),
        ({"watch": {"sycophancy": 1}}, "watch in the run's header"),
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


# Resuming


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
    header = HEADER | {"dictionaries": [HEADER["dictionaries"][0] | {key: value}], "watch": {}}
    with pytest.raises(AuditError, match=f"whose {key} is"):
        RecordWriter.resume(written, header, 7)
    with pytest.raises(AuditError, match="made with 1 dictionaries"):
        RecordWriter.resume(written, HEADER | {"dictionaries": [*HEADER["dictionaries"], OTHER]}, 7)


def test_resuming_clears_what_a_killed_writer_left(written):
    (written / "steps" / "000099-0.parquet").write_text("half")
    (written / "totals" / "000099-0.safetensors.tmp").write_text("half")
    (written / "steps" / "notes.txt").write_text("mine")
    RecordWriter.resume(written, HEADER, 7)
    assert files_in(written) == named_in(RunRecord.load(written)) | {MANIFEST, "steps/notes.txt"}


# Death and disaster


def go_on(directory, n_steps):
    """What a run does that is started again after its death: continue from the record, if there is one."""
    if (Path(directory) / MANIFEST).exists():
        record = RunRecord.load(directory)
        totals = record.totals() if record.last_step else FeatureTotals(F)
        writer = RecordWriter.resume(directory, HEADER, record.last_step)
    else:
        totals, writer = FeatureTotals(F), RecordWriter.create(directory, HEADER)
    first = writer.last_step + 1
    write_steps(writer, totals, range(first, first + n_steps))
    writer.close()


def die_everywhere(template, limit):
    """Go on from copies of a record, each time dying one system call later, until a run survives.

    This process starts no threads itself, so that it can fork.
    """
    for die_at in range(1, limit):
        directory = template.parent / str(die_at)
        shutil.copytree(template, directory)
        child = os.fork()
        if child == 0:
            count_down_to_death(die_at)
            go_on(directory, 2)
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            return


def count_down_to_death(die_at):
    left = [die_at]

    def deadly(call):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in ("write_temporary", "sync_directory", "checksum"):
        setattr(record_files, name, deadly(getattr(record_files, name)))
    for name in ("replace", "unlink", "mkdir"):
        setattr(Path, name, deadly(getattr(Path, name)))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "trl_sae_audit.record", "trl_sae_audit.record_writer"])
    return context


def test_a_run_killed_at_random_instants_stays_readable(tmp_path, processes):
    random.seed(0)
    for _ in range(15):
        before = RunRecord.load(tmp_path).last_step if (tmp_path / MANIFEST).exists() else 0
        target = before + random.randint(0, 4)
        child = processes.Process(target=go_on, args=(tmp_path, 10_000))
        child.start()
        while not (tmp_path / MANIFEST).exists() or read_manifest(tmp_path).last_step < target:
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.01))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        record = RunRecord.load(tmp_path)
        assert_consistent(record)
        assert record.last_step >= target


def test_a_run_killed_between_any_two_system_calls_stays_readable(tmp_path, processes):
    template = tmp_path / "template"
    write_steps(RecordWriter.create(template, HEADER), FeatureTotals(F), range(1, 4))
    supervisor = processes.Process(target=die_everywhere, args=(template, 200))
    supervisor.start()
    supervisor.join()
    deaths = sorted(int(path.name) for path in tmp_path.iterdir() if path != template)
    records = [RunRecord.load(tmp_path / str(death)) for death in deaths]
    for record in records:
        assert_consistent(record)
    assert 40 < len(records) < 199
    assert {record.last_step for record in records} == {3, 4, 5}
    assert [record.status for record in records].count("running") > 30
    assert records[-1].status == "finished"


def test_a_forked_worker_neither_writes_nor_keeps_the_lock(tmp_path):
    writer = RecordWriter.create(tmp_path, HEADER)
    reader, signaller = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(signaller, b"closed" if writer.closed else b"open..")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reader, 6) == b"closed"
        assert not writer.closed
        writer.close()
        RecordWriter.resume(tmp_path, HEADER, 0).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("failing_write", [1, 2, 3])
def test_a_full_disk_changes_nothing(tmp_path, monkeypatch, failing_write):
    writer = RecordWriter.create(tmp_path, HEADER)
    totals = write_steps(writer, FeatureTotals(F), range(1, 6))
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    take_step(writer, totals, 6)
    writes = 0

    def full(descriptor):
        nonlocal writes
        writes += 1
        if writes == 2 * failing_write - 1:  # the directory is synced after each file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(record_files.os, "fsync", full)
        with pytest.raises(AuditError, match=r"No space left on device.*intact up to step 5"):
            writer.flush(6, {"mine": totals})
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before
    assert RunRecord.load(tmp_path).last_step == 5
    writer.flush(6, {"mine": totals})
    assert_consistent(RunRecord.load(tmp_path))


def test_a_full_disk_at_the_end_still_frees_the_directory(tmp_path, monkeypatch):
    writer = RecordWriter.create(tmp_path, HEADER)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(record_files.os, "fsync", full)
        with pytest.raises(AuditError, match="No space left"):
            writer.close("finished", 1, {"mine": FeatureTotals(F)})
    RecordWriter.resume(tmp_path, HEADER, 0)


def write_all(directory, n_steps):
    writer = RecordWriter.create(directory, HEADER)
    totals = write_steps(writer, FeatureTotals(F), range(1, n_steps + 1))
    writer.close("finished", n_steps, {"mine": totals})


def test_a_record_can_be_read_while_it_is_written(tmp_path, processes):
    child = processes.Process(target=write_all, args=(tmp_path, 60))
    child.start()
    while not (tmp_path / MANIFEST).exists():
        time.sleep(0.005)
    seen = set()
    while child.is_alive():
        record = RunRecord.load(tmp_path)
        assert_consistent(record)
        seen.add(record.last_step)
    child.join()
    assert child.exitcode == 0
    assert len(seen) > 5
    assert RunRecord.load(tmp_path).status == "finished"


def test_files_deleted_between_manifest_and_reading_are_looked_up_anew(written, monkeypatch):
    stale = RunRecord.load(written)._stored
    totals = RunRecord.load(written).totals()
    write_steps(RecordWriter.resume(written, HEADER, 7), totals, [8])
    answers = [stale]
    monkeypatch.setattr(
        record_reader, "read_manifest", lambda path: answers.pop() if answers else read_manifest(path)
    )
    assert RunRecord.load(written).last_step == 8


# What is refused


def test_what_is_no_record_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(AuditError, match="is not a run record"):
            RunRecord.load(path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(AuditError, match="not the manifest of a run record"):
        RunRecord.load(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_schema_version_is_refused(written, version):
    edit_manifest(written, lambda manifest: manifest.update(schema_version=version))
    with pytest.raises(AuditError, match="schema version"):
        RunRecord.load(written)


@pytest.mark.parametrize("kind", ["steps", "totals"])
def test_damaged_files_are_named(written, kind):
    path = next((written / kind).iterdir())
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(AuditError, match=rf"{path.name} has .* truncated"):
        RunRecord.load(written)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(AuditError, match=f"{path.name} is corrupt"):
        RunRecord.load(written)
    path.unlink()
    with pytest.raises(AuditError, match=f"{path.name}, which the manifest names, cannot be read"):
        RunRecord.load(written)
    os.mkfifo(path)
    with pytest.raises(AuditError, match=f"{path.name}, which the manifest names, is not a file"):
        RunRecord.load(written)


def test_a_truncated_manifest_is_refused(written):
    text = (written / MANIFEST).read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        (written / MANIFEST).write_text(text[:length])
        with pytest.raises(AuditError, match="is damaged"):
            RunRecord.load(written)


@pytest.mark.parametrize(
    "file", ["../secret", "/etc/passwd", "steps/../../secret", "link/secret", "steps/\0"]
)
def test_no_path_leaves_the_directory(written, file):
    (written.parent / "secret").write_text("secret")
    (written / "link").symlink_to(written.parent)
    edit_manifest(written, lambda manifest: manifest["tables"]["steps"][0].update(file=file))
    with pytest.raises(AuditError, match="outside the record"):
        RunRecord.load(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tables"]["steps"][0].update(bytes=3), "truncated or changed"),
        (lambda m: m["tables"]["steps"][0].update(rows=3), "rows where the manifest says 3"),
        (lambda m: m["tables"]["steps"][0].update(rows="3"), "is damaged"),
        (lambda m: m["tables"].update(steps=3), "is damaged"),
        (lambda m: m["totals"]["mine"].update(rows=6), "is damaged"),
        (lambda m: m["totals"].update(mine=None), "is damaged"),
        (lambda m: m["totals"].update(yours=m["totals"]["mine"]), "is damaged"),
        (lambda m: m["dictionaries"][0].update(d_sae=6) or m["totals"]["mine"].update(rows=6), "says 6"),
        (lambda m: m.update(status="resting"), "is damaged"),
        (lambda m: m.update(last_step=True), "is damaged"),
        (lambda m: m.update(dictionaries=[]), "is damaged"),
        (lambda m: m.pop("created"), "is damaged"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(written, change, message):
    edit_manifest(written, change)

    def read_everything():
        record = RunRecord.load(written)
        record.steps()
        record.totals()

    with pytest.raises(AuditError, match=message):
        read_everything()


def test_a_part_of_another_format_is_refused(written):
    path = written / json.loads((written / MANIFEST).read_text())["tables"]["steps"][0]["file"]
    path.write_bytes(b"not parquet")
    edit_manifest(
        written,
        lambda m: m["tables"]["steps"][0].update(
            file=f"steps/{path.name}", bytes=11, crc32=record_files.checksum(b"not parquet")
        ),
    )
    with pytest.raises(AuditError, match="not a readable Parquet file"):
        RunRecord.load(written).steps()


def test_versions_are_found_without_importing_the_packages():
    versions = record_writer.package_versions()
    assert versions["numpy"] == np.__version__
    assert "python" in versions
