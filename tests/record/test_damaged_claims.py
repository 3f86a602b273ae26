"""A record whose manifest lacks what a reader relied on."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.report_sources import make_dictionary, make_record

from trl_sae_audit import RunRecord


def test_a_record_without_the_models_name_is_printed(tmp_path: Path) -> None:
    directory = make_record(tmp_path / "run", make_dictionary())
    path = Path(directory) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest.pop("model", None)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert "a model without a name" in str(RunRecord.load(directory))
