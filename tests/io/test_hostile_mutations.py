"""Valid file, random mutation: the same value, a clear sentence, or another value where no checksum covers the file.

`scripts/fuzz.py` does the same many times more often.
"""

from __future__ import annotations

import json
import os
import signal

import pytest
from helpers.hostile import QUICKLY, READERS
from helpers.hostile.fuzz import Fuzz, run
from helpers.hostile.readers import Reader, text_of, write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sae_audit import AuditError


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_as_before_or_refused(tmp_path, name):
    reader = READERS[name]
    (tmp_path / "valid").mkdir()
    reader.write(tmp_path / "valid")
    one = Fuzz(name, reader, tmp_path, text_of(reader.read(tmp_path / "valid")))

    @settings(QUICKLY, max_examples=max(3, 15 // reader.cost))
    @given(st.integers(0, 2**32))
    def mutated(iteration):
        outcome, detail = one.once(iteration)
        assert outcome in ("as before", "another value", "refused"), detail
        assert outcome != "refused" or len(detail) > 10

    mutated()


def test_the_fuzzer_sees_a_crash_a_bomb_and_a_silent_change(tmp_path):
    def careless(directory):
        content = (directory / "x.json").read_bytes()
        if len(content) > 60:
            bytearray(2**40)
        return json.loads(content)

    write = write_file("x.json", b'{"a": 1, "b": [2, 3]}')
    tally = run("careless", Reader(write, careless, checked=("*",)), 80, 0, 2**29)
    found = " ".join(tally.failures)
    assert "JSONDecodeError" in found
    assert "MemoryError" in found
    assert tally.counts["silent"] > 0

    def deadly(directory):
        if b"\x00" in (directory / "x.json").read_bytes():
            os.kill(os.getpid(), signal.SIGKILL)

    assert "the process died" in run("deadly", Reader(write, deadly), 60, 0, 2**29).failures


@pytest.mark.parametrize("name", ["pairs.parquet", "flags", "calibration"])
def test_a_file_cut_short_anywhere_is_refused_or_said_to_be_another(tmp_path, name):
    reader = READERS[name]
    reader.write(tmp_path)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    content = file.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 150)):
        file.write_bytes(content[:length])
        try:
            reader.read(tmp_path)
        except AuditError:
            continue
        assert name == "flags", length
