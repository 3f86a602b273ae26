"""Files are UTF-8, and a terminal of another encoding ends no command."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trl_sae_audit import FlagSet

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "trl_sae_audit").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
LABEL = "Schmeichelei → „süß“ 😀"
PROGRAM = """
import itertools, sys
from trl_sae_audit.cli.main import main

for is_mark, words in itertools.groupby(sys.argv[1:], lambda word: word == "--"):
    if not is_mark:
        assert main(list(words)) == 0
"""


def without_encoding(code: str) -> list[int]:
    """Lines that read or write text and leave its encoding to the machine."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        modes = [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
        as_text = any(set(mode) <= set("rwaxt+") for mode in modes)
        match node.func:
            case ast.Attribute(attr="read_text" | "write_text"):
                found.append(node.lineno)
            case ast.Attribute(attr="open") if as_text:
                found.append(node.lineno)
            case ast.Name(id="open") if as_text or not modes:
                found.append(node.lineno)
    return found


def test_every_text_file_has_an_encoding() -> None:
    found = {path.relative_to(ROOT): without_encoding(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_the_search_finds_what_it_looks_for() -> None:
    code = 'path.read_text()\nfile.write_text(x)\nopen(path)\npath.open("w")\ngzip.open(name, "rt")'
    assert without_encoding(code) == [1, 2, 3, 4, 5]
    assert without_encoding('path.open("rb")\nopen(path, encoding="utf-8")\nAuditStore.open(path)') == []


@pytest.fixture(scope="module")
def directory(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of its own, audited, whose flags have a label beyond ASCII: written where there is nothing but ASCII."""
    copy = tmp_path_factory.mktemp("encodings") / "work"
    shutil.copytree(workspace, copy)
    sae = ["--model", "model", "--dictionary", "sae", "--dataset", "pairs.jsonl"]
    run(
        copy,
        "ascii",
        ["audit", *sae, "--output_dir", "audited"],
        ["flag", "audited", "--feature", "3", "--label", LABEL],
    )
    return copy


def run(directory: Path, encoding: str, *commands: list[str]) -> bytes:
    """What commands print, one after the other, in a terminal of that encoding and Python's oldest ways."""
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(word for command in commands for word in ("--", *command))],
        cwd=directory,
        env={**os.environ, **settings, "COLUMNS": "80"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert b"Traceback" not in done.stderr
    return done.stdout


def test_a_label_beyond_ascii_is_kept_in_the_file(directory: Path) -> None:
    assert FlagSet.load(directory / "flags.yaml")[0].label == LABEL
    assert LABEL in (directory / "flags.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_encoding_of_the_terminal_ends_a_command(directory: Path, encoding: str) -> None:
    kept = f"kept-{encoding}"
    data = ["--dataset", "pairs.jsonl"]
    printed = run(
        directory,
        encoding,
        ["flag", "audited", "--feature", "5", "--label", LABEL, "--flags", f"{kept}.yaml"],
        [
            "filter",
            *data,
            "--audit",
            "audited",
            "--flags",
            f"{kept}.yaml",
            "--budget",
            "2",
            "--output_dir",
            kept,
        ],
        ["compare", "audited", "audited", "--names", LABEL, "plain"],
        ["report", "audited", "--title", LABEL, "--output", f"{kept}.html"],
    ).decode(encoding)
    assert "Schmeichelei" in printed
    assert "?" in printed  # the smiling face
    assert not [line for line in printed.splitlines() if len(line) > 80]
    assert LABEL in (directory / f"{kept}.html").read_text(encoding="utf-8")
    assert LABEL in (directory / kept / "README.md").read_text(encoding="utf-8")


def test_json_loses_nothing(directory: Path) -> None:
    command = ["compare", "audited", "audited", "--names", LABEL, "plain", "--json"]
    assert json.loads(run(directory, "ascii", command))["runs"][0]["name"] == LABEL


def test_help_in_ascii(directory: Path) -> None:
    printed = run(directory, "ascii", ["--help"]).decode("ascii")
    assert "trl-sae-audit COMMAND" in printed
