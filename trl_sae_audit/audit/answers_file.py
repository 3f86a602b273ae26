"""The answers of an audit of a reward, kept with it: JSON lines, one a row of what was audited."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from ..io.manifest import reading
from ..io.untrusted import parse_json, read_bytes
from .store import AuditStore

ANSWERS = "answers.jsonl"
_LARGEST = 2**32
_KEPT = ("prompt", "completion", "completion_ids", "reward", "advantage", "group")


def keep_answers(store: AuditStore, rows: list[dict[str, Any]]) -> None:
    """Write the answers, without the other columns of their dataset."""
    store.write(ANSWERS, answers_content(rows))


def answers_content(rows: list[dict[str, Any]]) -> bytes:
    """The bytes of the file."""
    kept = [{name: row[name] for name in _KEPT if name in row} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode("utf-8", "replace")


def answers_digest(rows: list[dict[str, Any]]) -> str:
    """SHA-256 of the file, for the manifest."""
    return hashlib.sha256(answers_content(rows)).hexdigest()


def read_answers(store: AuditStore) -> list[dict[str, Any]]:
    """The answers, in the order of the audit's rows; none of an audit of pairs.

    Raises:
        AuditError: the file is not the one that was written.
    """
    expected = store.manifest["loss"].get("answers_sha256")
    if expected is None:
        return []
    path = store.directory / ANSWERS
    with reading(path):
        content = read_bytes(path, _LARGEST)
        if hashlib.sha256(content).hexdigest() != expected:
            raise ValueError("its content hash is not the manifest's")
        return [dict(parse_json(line)) for line in content.decode("utf-8").split("\n") if line]


def read_groups(store: AuditStore) -> np.ndarray | None:
    """Number of each row's prompt [rows], −1 of a row that is no answer; None of an audit of pairs."""
    rows = read_answers(store)
    with reading(store.directory / ANSWERS):
        if rows and len(rows) != store.manifest["rows"]:
            raise ValueError(f"it has {len(rows)} rows, and the audit {store.manifest['rows']}")
        return np.array([row.get("group", -1) for row in rows], np.int64) if rows else None
