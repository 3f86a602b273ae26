"""What a command imports before it has something to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile.readers import READERS

from trl_sae_audit import Audit
from trl_sae_audit.cli import main as cli

pytestmark = pytest.mark.newest

HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "pandas", "pyarrow", "scipy", "sae_lens")
PROGRAM = """
import contextlib, io, json, sys
from trl_sae_audit.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(json.dumps([name for name in sys.modules if "." not in name]))
"""


def imported(program: str, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    names: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return set(names)


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_imports_nothing_heavy(command: str | None) -> None:
    names = imported(PROGRAM, *([command] if command else []), "--help")
    assert "trl_sae_audit" in names
    assert not names & set(HEAVY)


def test_what_a_mistake_costs() -> None:
    assert not imported(PROGRAM, "audit", "--modle", "m") & set(HEAVY)


def test_flag_reads_an_audit_without_what_scores_one(tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    audit.mkdir()
    READERS["audit"].write(audit)
    Audit.load(audit).features()  # leaves the table
    names = imported(PROGRAM, "flag", str(audit), "--feature", "2", "--flags", str(tmp_path / "flags.yaml"))
    assert (tmp_path / "flags.yaml").is_file()
    assert "pyarrow" in names
    assert not names & {*HEAVY} - {"pyarrow"}


def test_a_flag_is_light() -> None:
    program = "import json, sys; from trl_sae_audit import Flag, FlagSet, AuditError; print(json.dumps(list(sys.modules)))"
    names = imported(program)
    assert "numpy" in names
    assert not {name.split(".")[0] for name in names} & {*HEAVY, "rich", "safetensors"}
