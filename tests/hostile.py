"""What the tests of broken and hostile input share: every reader of the package, with a valid input to break."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import fuzz
from fuzzing import readers as valid

__all__ = ["QUICKLY", "READERS", "edit", "fuzz", "valid"]

READERS = valid.readers()
QUICKLY = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
