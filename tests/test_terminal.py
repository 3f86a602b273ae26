"""What every command prints where nobody looks: results only, within 80 columns, or one JSON document."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import worlds
from sae_lens import SAE

from trl_sae_audit import cli, terminal

ROOT = Path(__file__).parent.parent
RUNNER = """
import json, os, sys
from pathlib import Path
from trl_sae_audit.cli import main

for name, argv in json.loads(Path("plan.json").read_text()).items():
    for number, file in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{file}", os.O_WRONLY | os.O_CREAT), number)
    code = main(argv)
    sys.stdout.flush(), sys.stderr.flush()
    Path(f"{name}.code").write_text(str(code))
"""
MODEL = ["--model_name_or_path", "model"]
PLAN = {
    "audit": ["audit", *MODEL, "--dataset", "pairs.jsonl", "--sae", "sae", "--output_dir", "audited"],
    "flag": ["flag", "audited", "--feature", "3", "--label", "[red]flattery[/red]"],
    "filter": [
        *("filter", "--dataset", "pairs.jsonl", "--audit", "audited", "--budget", "0.1"),
        *("--control", "true", "--output_dir", "kept"),
    ],
    "verify": [
        *("verify", "audited", *MODEL, "--after", "model-after", "--sae", "sae", "--dataset", "pairs.jsonl"),
        *("--max_new_tokens", "6", "--draws", "20"),
    ],
    "report": ["report", "audited"],
    "compare": ["compare", "audited", "audited", "--names", "one", "two"],
    "doctor": ["doctor", *MODEL, "--texts", "pairs.jsonl", "--sae", "sae"],
    "train-sae": [
        *("train-sae", *MODEL, "--texts", "pairs.jsonl", "--hook_point", "model.layers.1"),
        *("--training_tokens", "640", "--sae_batch_size", "64", "--max_fvu", "9", "--max_dead", "1"),
        *("--d_sae", "64", "--output_dir", "trained"),
    ],
}
ELSEWHERE = {
    "flag": {"flags": "json.yaml"},
    "filter": {"output_dir": "json-kept"},
    "train-sae": {"output_dir": "t2"},
}
"""What the second run, with --json, must not share with the first."""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All commands, twice, in one process that starts with nothing imported, as a command does."""
    directory = tmp_path_factory.mktemp("printed")
    tokenizer = worlds.make_tokenizer()
    worlds.make_model(tokenizer).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    worlds.make_model(tokenizer, seed=9).save_pretrained(directory / "model-after")
    tokenizer.save_pretrained(directory / "model-after")
    pairs = worlds.pairs(30).to_list()
    text = "".join(json.dumps(pair) + "\n" for pair in [*pairs, pairs[0]])
    (directory / "pairs.jsonl").write_text(text)
    metadata = {"hook_name": worlds.HOOK_POINT, "model_name": "model"}
    settings = {"architecture": "topk", "d_in": worlds.D_MODEL, "d_sae": 64, "k": 4, "device": "cpu"}
    SAE.from_dict(settings | {"dtype": "float32", "metadata": metadata}).save_model(directory / "sae")
    plan = {}
    for name, argv in PLAN.items():
        plan[name] = argv
        changed = [
            word for option, value in ELSEWHERE.get(name, {}).items() for word in (f"--{option}", value)
        ]
        plan[f"{name}.json"] = [*argv, *changed, "--json"]
    (directory / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


@pytest.mark.parametrize("command", PLAN)
def test_results_and_nothing_else(printed: Path, command: str) -> None:
    shown = (printed / f"{command}.out").read_text()
    assert shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "\x1b" not in shown
    said = (printed / f"{command}.err").read_text()
    expected = 1 if command == "audit" else 0  # a duplicate row, of which this package warns
    assert len(said.splitlines()) == expected, said
    assert all(line.startswith("trl-sae-audit: warning: 1 of 31 rows") for line in said.splitlines())
    assert int((printed / f"{command}.code").read_text()) == (1 if command == "doctor" else 0)


@pytest.mark.parametrize("command", PLAN)
def test_json_is_one_document_with_what_the_text_says(printed: Path, command: str) -> None:
    document = json.loads((printed / f"{command}.json.out").read_text(), parse_constant=pytest.fail)
    shown = (printed / f"{command}.out").read_text()
    for value in {
        "audit": lambda: (document["top"][0]["feature"], document["examples"]),
        "flag": lambda: (document["flag"]["label"], f"{document['found']['q_value']:.2g}"),
        "filter": lambda: (document["kept"], f"{document['flags'][0]['attribution_after']:+.3g}"),
        "verify": lambda: document["targets"],
        "report": lambda: (document["report"],),
        "compare": lambda: ("one", "two"),
        "doctor": lambda: (document["checks"][0]["found"], f"{document['health']['fvu']:.3f}"),
        "train-sae": lambda: (document["d_sae"], f"{document['fvu']:.3f}"),
    }[command]():
        assert str(value) in shown


def test_every_command_is_looked_at() -> None:
    assert {*PLAN, "demo"} == {*cli.COMMANDS}  # the demo, which is long, in test_demo.py


def test_json_knows_no_nan_and_keeps_numbers() -> None:
    document = {"a": np.float32(np.nan), "b": [np.int64(3), float("inf")], "c": Path("x"), 1: np.array([1.5])}
    assert json.loads(terminal.as_json(document)) == {"a": None, "b": [3, None], "c": "x", "1": [1.5]}
    with pytest.raises(TypeError):
        terminal.as_json({"a": object()})


def test_quiet_ends_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    ours = logging.getLogger("trl_sae_audit")
    before = (list(ours.handlers), ours.propagate, list(warnings.filters))
    with terminal.quiet():
        warnings.warn("of a library", FutureWarning, stacklevel=1)
        ours.getChild("audit").warning("of ours")
    assert capsys.readouterr().err == "trl-sae-audit: warning: of ours\n"
    assert (list(ours.handlers), ours.propagate, list(warnings.filters)) == before


def test_a_table_folds_and_a_path_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    output = terminal.OutputArguments()
    long = "word " * 40 + "x" * 100
    output.show({}, terminal.table("T", {"a": "left", "b": "right"}, [[long, "1"]]), terminal.to_copy(long))
    *rows, path = capsys.readouterr().out.splitlines()
    assert max(map(len, rows)) <= 80
    assert path == long


def test_top_level_help_fits() -> None:
    assert max(map(len, cli.top_level_help().splitlines())) <= 80
