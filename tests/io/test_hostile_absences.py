"""What is missing in a manifest or a table is said, or not needed: every key and every column removed in turn."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hostile import READERS
from helpers.hostile.fuzz import correct_checksum
from helpers.hostile.readers import text_of

from trl_sae_audit import AuditError
from trl_sae_audit.io.manifest import MANIFEST


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a JSON document, and the first two of every list."""
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2] if isinstance(value, list) else ())
    )
    for key, each in inner:
        yield (*place, key)
        yield from places(each, (*place, key))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["run record", "audit", "audit of a reward", "filtered", "verified", "checkpoint", "directions"]
)
def test_every_key_of_a_manifest_is_needed_and_said_or_not_needed(tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    reader.write(tmp_path)
    for path in sorted(tmp_path.rglob(MANIFEST)):
        written = json.loads(path.read_text())
        for place in list(places(written)):
            changed = copy.deepcopy(written)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            del inner[place[-1]]
            path.write_text(json.dumps(changed))
            with suppress(AuditError):
                text_of(reader.read(tmp_path))
        path.write_text(json.dumps(written))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["run record", "audit", "report of a record"])
def test_every_column_of_a_table_is_needed_and_said_or_not_needed(tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    reader.write(tmp_path)
    for path in sorted(tmp_path.rglob("*.parquet")):
        written, rows = path.read_bytes(), pq.read_table(path)
        for column in rows.column_names:
            for changed in (
                rows.drop_columns([column]),
                rows.set_column(rows.column_names.index(column), column, pa.array([math.nan] * len(rows))),
            ):
                pq.write_table(changed, path)
                correct_checksum(tmp_path, path, path.read_bytes())
                with suppress(AuditError):
                    text_of(reader.read(tmp_path))
        path.write_bytes(written)
        correct_checksum(tmp_path, path, written)
