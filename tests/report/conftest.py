"""A record to report."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.report_sources import make_dictionary, make_record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_record(tmp_path_factory.mktemp("runs") / "plain", make_dictionary())
