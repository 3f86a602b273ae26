"""What every command prints where nobody looks: results only, within 80 columns, or one JSON document."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import worlds
from rich.console import Console

from trl_sae_audit import console as terminal
from trl_sae_audit.cli import main as cli
from trl_sae_audit.cli.options import OutputArguments

ROOT = Path(__file__).parents[1]
RUNNER = """
import json, os, sys
from pathlib import Path
from trl_sae_audit.cli.main import main

for name, argv in json.loads(Path("plan.json").read_text()).items():
    for number, file in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{file}", os.O_WRONLY | os.O_CREAT), number)
    code = main(argv)
    sys.stdout.flush(), sys.stderr.flush()
    Path(f"{name}.code").write_text(str(code))
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
"""A terminal that knows the fewest characters: none of them ends a command."""
MODEL = ["--model", "model"]
PLAN = {
    "audit": ["audit", *MODEL, "--dataset", "pairs.jsonl", "--dictionary", "sae", "--output_dir", "audited"],
    "flag": ["flag", "audited", "--feature", "3", "--label", "[red]flattery[/red]"],
    "filter": [
        *("filter", "--dataset", "pairs.jsonl", "--audit", "audited", "--budget", "0.1"),
        *("--control", "true", "--output_dir", "kept"),
    ],
    "verify": [
        *(
            "verify",
            "audited",
            *MODEL,
            "--after",
            "model-after",
            "--dictionary",
            "sae",
            "--dataset",
            "pairs.jsonl",
        ),
        *("--max_new_tokens", "6", "--draws", "20"),
    ],
    "diff": [
        *("diff", "model", "model-after", "--dictionary", "sae", "--dataset", "pairs.jsonl"),
        *("--samples", "1", "--max_new_tokens", "6"),
    ],
    "report": ["report", "audited"],
    "compare": ["compare", "audited", "audited", "--names", "one", "two"],
    "label": ["label", "audited", "--labels_from", "file", "--labels", "labels.jsonl", "--no_scores"],
    "doctor": ["doctor", *MODEL, "--dataset", "pairs.jsonl", "--dictionary", "sae"],
    "cost": ["cost", *MODEL, "--features", "64", "--processes", "8"],
    "train-sae": [
        *("train-sae", *MODEL, "--dataset", "pairs.jsonl", "--hook_point", "model.layers.1"),
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
    """All commands, twice, in one process that starts with nothing imported, as a command does; its output is ASCII."""
    directory = tmp_path_factory.mktemp("printed")
    tokenizer = worlds.make_tokenizer()
    worlds.save_model(worlds.make_model(tokenizer), tokenizer, directory / "model")
    worlds.save_model(worlds.make_model(tokenizer, seed=9), tokenizer, directory / "model-after")
    pairs = worlds.pairs(30).to_list()
    text = "".join(json.dumps(pair) + "\n" for pair in [*pairs, pairs[0]])
    (directory / "pairs.jsonl").write_text(text)
    worlds.save_sae(directory / "sae", model_name="model")
    (directory / "labels.jsonl").write_text('{"feature": 3, "label": "flattery"}')
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
        env=os.environ | {"PYTHONPATH": str(ROOT)} | ASCII,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


@pytest.mark.parametrize("command", PLAN)
def test_results_and_nothing_else(printed: Path, command: str) -> None:
    shown = (printed / f"{command}.out").read_text("ascii")
    assert shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "\x1b" not in shown
    said = (printed / f"{command}.err").read_text()
    expected = []
    if command in ("audit", "filter"):  # a duplicate row, of which this package warns
        expected = ["trl-sae-audit: warning: 1 of 31 rows"]
    if command == "audit":
        expected = ["This audit will take ", *expected]
    assert len(said.splitlines()) == len(expected), said
    assert all(line.startswith(start) for line, start in zip(said.splitlines(), expected, strict=True))
    assert int((printed / f"{command}.code").read_text()) == (1 if command == "doctor" else 0)


@pytest.mark.parametrize("command", PLAN)
def test_json_is_one_document_with_what_the_text_says(printed: Path, command: str) -> None:
    document = json.loads((printed / f"{command}.json.out").read_text(), parse_constant=pytest.fail)
    shown = (printed / f"{command}.out").read_text()
    for value in {
        "audit": lambda: (document["top"][0]["feature"], document["examples"]),
        "flag": lambda: (document["flag"]["label"], f"{document['found']['q_value']:.2g}"),
        "filter": lambda: (document["kept"], f"{document['flags'][0]['disparity_after']:+.2f}"),
        "verify": lambda: document["targets"],
        "diff": lambda: (document["answers"], document["writes"]["top"][0]["feature"]),
        "report": lambda: (document["report"],),
        "compare": lambda: ("one", "two"),
        "label": lambda: (document["labels"], document["number"]),
        "cost": lambda: (f"after layer {document['run']['layer']} of {document['model']['layers']}",),
        "doctor": lambda: (document["checks"][0]["found"], f"{document['health']['fvu']:.3f}"),
        "train-sae": lambda: (document["d_sae"], f"{document['fvu']:.3f}"),
    }[command]():
        assert str(value) in shown


def test_every_command_is_looked_at() -> None:
    # the demo, which is long, in test_demo.py; directions, which need a model that tells answers apart, in test_contrast.py
    assert {*PLAN, "demo", "direction"} == {*cli.COMMANDS}


def test_json_knows_no_nan_and_keeps_numbers() -> None:
    document = {"a": np.float32(np.nan), "b": [np.int64(3), float("inf")], "c": Path("x"), 1: np.array([1.5])}
    assert json.loads(terminal.to_json(document)) == {"a": None, "b": [3, None], "c": "x", "1": [1.5]}
    with pytest.raises(TypeError):
        terminal.to_json({"a": object()})


def test_silence_ends_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    ours = logging.getLogger("trl_sae_audit")
    before = (list(ours.handlers), ours.propagate, list(warnings.filters))
    with terminal.silence_libraries():
        warnings.warn("of a library", FutureWarning, stacklevel=1)
        assert not logging.getLogger("trl.trainer.dpo_trainer").isEnabledFor(logging.WARNING)
        ours.getChild("audit").warning("of ours")
    assert capsys.readouterr().err == "trl-sae-audit: warning: of ours\n"
    assert logging.getLogger("trl").level == logging.NOTSET
    assert (list(ours.handlers), ours.propagate, list(warnings.filters)) == before


def test_a_table_folds_and_a_path_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    output = OutputArguments()
    long = "word " * 40 + "x" * 100
    output.show(
        {}, terminal.table("T", {"a": "left", "b": "right"}, [[long, "1"]]), terminal.single_line(long)
    )
    *rows, path = capsys.readouterr().out.splitlines()
    assert max(map(len, rows)) <= 80
    assert path == long


@pytest.mark.parametrize("width", [80, 40, 20])
def test_a_number_is_never_broken(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of text give way first, down to eight characters; below that lines are longer than the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    numbers = ["1423", "+1.83e-03", "−40 [−51, −26] *", "12 GiB"]
    columns = {
        "feature": "right",
        "attribution of it": "left",
        "from the first": "left",
        "size": "right",
        "words": "left",
    }
    words = "agrees with whatever the user believes " * 3
    OutputArguments().show(
        {}, terminal.table("A title of more than twenty letters", columns, [[*numbers, words]])
    )  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    lines = [line.rstrip() for line in printed.splitlines()]
    assert any(all(number in line for number in numbers) for line in lines)
    assert any(line.startswith("   1423") for line in lines)  # aligned to its side
    assert "whatever" in printed
    if width == 80:
        assert max(map(len, lines)) <= 80


def test_a_number_that_is_not_known_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"score": "right", "share": "right", "words": "left"}
    unknown = f"{np.nan:+.2f} [{np.nan:+.2f}, {np.nan:+.2f}]"
    rows = [[unknown, f"{np.nan:.0%}", "nan"], [f"0.30 [{np.nan:.2f}, {np.nan:.2f}]", "5%", "nanny"]]
    OutputArguments().show({}, terminal.table("T", columns, rows))  # type: ignore[arg-type]
    *_, first, second = (line.split() for line in capsys.readouterr().out.strip().splitlines())
    assert first == ["–", "–", "nan"]
    assert second == ["0.30", "5%", "nanny"]


def test_top_level_help_fits() -> None:
    assert max(map(len, cli.top_level_help().splitlines())) <= 80


@pytest.mark.parametrize(("width", "shown"), [(60, 2), (80, 3), (120, 5)])
def test_words_get_the_room_that_the_numbers_leave(width, shown):
    """Columns that may go do, the last of the list last, and are named; a number is never cut, the words are with an ellipsis."""
    numbers = {f"column {number}": "right" for number in range(5)}
    words = "Great question! · you're absolutely right · what a great idea of yours, and so on"
    row = [f"+{number}.234567e-03" for number in range(5)]
    optional = [f"column {number}" for number in (4, 3, 2)]
    made = terminal.table(
        "A title", {**numbers, "words": "left"}, [[*row, words]], words="words", optional=optional
    )
    with io.StringIO() as file:
        Console(file=file, width=width).print(made)
        text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert [cell in text for cell in row] == [True] * shown + [False] * (5 - shown)
    assert "Great question!" in text
    assert "…" in text
    omitted = ", ".join(f"column {number}" for number in range(shown, 5))
    assert text.splitlines()[-2].startswith("+" if shown == 5 else "Not shown")
    assert (f"Not shown in {width} columns: {omitted}." in text) == (shown < 5)


def test_a_word_that_a_heading_breaks_is_whole_where_its_column_is_named() -> None:
    columns = {"feature": "right", "else-\nwhere": "right", "words": "left"}
    made = terminal.table(
        "T", columns, [["61", "+1.23e-03", "x" * 60]], words="words", optional=["else-\nwhere"]
    )
    with io.StringIO() as file:
        Console(file=file, width=24).print(made)
        assert "elsewhere" in file.getvalue()


@pytest.mark.parametrize("width", [64, 66, 70, 80])
def test_short_words_take_no_room_from_the_numbers(width: int) -> None:
    numbers = dict.fromkeys(["feature", "attribution", "suppressed", "rejected", "lift"], "right")
    row = ["61", "+0.0495", "-0.00379", "+0.000189", "+1.5e-05"]
    made = terminal.table(
        "T", {**numbers, "words": "left"}, [[*row, "praise"]], words="words", optional=["lift"]
    )
    with io.StringIO() as file:
        Console(file=file, width=width).print(made)
        text = file.getvalue()
    assert all(part in text for part in [*numbers, *row, "praise"])
    assert "Not shown" not in text


@pytest.mark.parametrize("width", range(20, 60, 3))
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_sentence_breaks_between_words_only(
    width: int, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "Flagged 你好 (sae/3): effect size -0.003 ± 0.02; selection +1e-4 ± .05, q < 0.05, r = 0.3; 95 % of [0.1, -2e-3] it is."
    out = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", str(width))
    OutputArguments().show({}, said)
    lines = out.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
    whole = " ".join(lines)
    parts = ["-0.003 ± 0.02;", "+1e-4 ± .05,", "q < 0.05,", "r = 0.3;", "95 %", "[0.1, -2e-3]"]
    for part in parts:
        wanted = part if encoding == "utf-8" else part.replace("±", "+-")
        assert any(wanted in line for line in lines), (wanted, lines)
    assert not any(line.endswith(" ") for line in lines)
    assert len(lines) > 1
    assert whole.startswith("Flagged")
    assert whole.endswith("it is.")
