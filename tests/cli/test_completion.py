"""The script that completes commands and options, asked as bash asks it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trl_sae_audit.cli import main as cli

pytestmark = pytest.mark.newest
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
$(complete -p trl-sae-audit | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fi"], {"filter"}),
        (["audit", "--data"], {"--dataset", "--dataset_name"}),
        (["doctor", "--dty"], {"--dtype"}),
        (["audit", "--no_look"], {"--no_lookahead"}),
    ],
)
def test_bash_completes(
    words: list[str], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    asked = ["bash", "-c", ASK, "-", str(script), "trl-sae-audit", *words]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    assert set(found) == expected


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--completion", "fish"]) == 2
    assert "bash, zsh, tcsh" in capsys.readouterr().err
