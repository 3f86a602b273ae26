"""Claims of a file are held against it and the machine; what never ends is not begun, and what does not belong together is not mixed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hostile import READERS, edit

from trl_sae_audit import AuditError
from trl_sae_audit.io.tables import read_frame
from trl_sae_audit.io.untrusted import read_json


@pytest.mark.parametrize(
    "name", ["flags", "outcomes", "evidence", "checkpoint", "pairs.jsonl", "pairs.parquet", "texts.txt"]
)
def test_a_pipe_or_a_device_is_refused_at_once(tmp_path, name):
    reader = READERS[name]
    reader.write(tmp_path)
    for file in [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".md"]:
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(AuditError):
            reader.read(tmp_path)
        file.unlink()
        file.symlink_to("/dev/zero")
        with pytest.raises(AuditError):
            reader.read(tmp_path)


def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    path, fstat = tmp_path / "manifest.json", os.fstat
    path.write_text('{"a": 1}')

    def replaced(descriptor):
        (tmp_path / "new").write_text('{"a": 1, "longer": 2}')
        (tmp_path / "new").replace(path)
        return fstat(descriptor)

    monkeypatch.setattr("trl_sae_audit.io.untrusted.os.fstat", replaced)
    assert read_json(path) == {"a": 1}
    assert read_json(path) == {"a": 1, "longer": 2}


def test_a_million_million_features_are_not_allocated(tmp_path):
    for kind in ("run record", "audit", "sae (topk)"):
        directory = tmp_path / kind.replace(" ", "-")
        directory.mkdir()
        READERS[kind].write(directory)
        for file in directory.glob("*.json"):
            text = file.read_text()
            file.write_text(
                text.replace('"d_sae": 6', f'"d_sae": {10**12}').replace('"rows": 6', f'"rows": {10**12}')
            )
        with pytest.raises(AuditError):
            READERS[kind].read(directory)


def test_rows_that_are_claimed_are_not_allocated(tmp_path):
    audit = tmp_path / "audit"
    audit.mkdir()
    READERS["audit"].write(audit)
    edit(audit / "manifest.json", lambda manifest: manifest.update(rows=10**12, parts=10**12))
    with pytest.raises(AuditError):
        READERS["audit"].read(audit)


def test_texts_that_unpack_to_more_than_there_is_are_refused(tmp_path):
    places = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(200_000, np.int32)), pa.array(["x" * 4_000_000])
    )
    pq.write_table(
        pa.table({"prompt": places}), tmp_path / "bomb.parquet", compression="zstd", store_schema=False
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"its texts would take .* GiB"):
        read_frame(tmp_path / "bomb.parquet")


def test_parts_of_two_audits_or_records_are_not_mixed(tmp_path):
    for kind, seed in (("audit", "parts/000000.safetensors"), ("run record", "steps")):
        one, other = (tmp_path / f"{kind}-{number}" for number in (1, 2))
        for directory in (one, other):
            directory.mkdir()
            READERS[kind].write(directory)
        if kind == "audit":
            edit(other / "manifest.json", lambda manifest: manifest.update(model="another"))
            with pytest.raises(AuditError, match="belongs to another audit"):
                READERS[kind].read(other)
        else:
            file, log = (next((one / table).iterdir()) for table in (seed, "log"))
            file.write_bytes(log.read_bytes())
            with pytest.raises(AuditError):
                READERS[kind].read(one)


@pytest.mark.parametrize("name", ["checkpoint", "run record"])
@pytest.mark.parametrize("size", [2**61, 2**70, 0, 1])
def test_a_size_that_the_file_has_not_is_not_allocated(tmp_path, name, size):
    reader = READERS[name]
    reader.write(tmp_path)

    def claim(manifest):
        for stored in manifest["files"]:
            stored.update(size=size, crc32=0)

    edit(tmp_path / "manifest.json", claim)
    with pytest.raises(AuditError, match="damaged"):
        reader.read(tmp_path)


@pytest.mark.parametrize("number", [10**400, 10**300, 1e300])
def test_a_probe_whose_numbers_no_tensor_holds(tmp_path, number):
    READERS["checkpoint"].write(tmp_path)
    edit(tmp_path / "manifest.json", lambda manifest: manifest.update(baselines={"tiny": [number]}))
    with pytest.raises(AuditError, match="damaged"):
        READERS["checkpoint"].read(tmp_path)


def test_damaged_size_statistics_of_a_table_do_not_end_the_process(tmp_path: Path) -> None:
    # The column is said to have no empty places, and its statistics are those of one that may have some.
    # pyarrow ends the process when it is asked for such a column's metadata.
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"x": [1, 2, 3]}), path)
    content = path.read_bytes()
    optional = b"\x25\x02\x18\x01x"
    assert content.count(optional) == 1
    path.write_bytes(content.replace(optional, b"\x25\x00\x18\x01x"))
    reading = f"from pathlib import Path; from trl_sae_audit.io.tables import read_parquet; read_parquet(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", reading], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ValueError: Definition level histogram" in done.stderr
