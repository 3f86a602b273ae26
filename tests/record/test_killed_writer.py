"""A run record is readable whatever happens to the run that writes it."""

import errno
import os
import random
import shutil
import signal
import time
import zlib
from pathlib import Path

import pytest
from helpers.records import HEADER, F, assert_consistent, files_in, take_step, write_steps

from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.errors import AuditError
from trl_sae_audit.io import atomic
from trl_sae_audit.io.manifest import MANIFEST
from trl_sae_audit.record.manifest import read_manifest
from trl_sae_audit.record.reader import RunRecord
from trl_sae_audit.record.writer import RecordWriter


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

    for module, name in ((atomic, "write_temporary"), (atomic, "sync_directory"), (zlib, "crc32")):
        setattr(module, name, deadly(getattr(module, name)))
    for name in ("replace", "unlink", "mkdir"):
        setattr(Path, name, deadly(getattr(Path, name)))


def test_a_run_killed_at_random_instants_stays_readable(tmp_path, processes):
    random.seed(0)
    for _ in range(15):
        before = RunRecord.load(tmp_path).last_step if (tmp_path / MANIFEST).exists() else 0
        target = before + random.randint(0, 4)
        child = processes.Process(target=go_on, args=(tmp_path, 10_000))
        child.start()
        while not (tmp_path / MANIFEST).exists() or read_manifest(tmp_path)["last_step"] < target:
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
        patch.setattr(atomic.os, "fsync", full)
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
        patch.setattr(atomic.os, "fsync", full)
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
