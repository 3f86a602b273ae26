"""One word, one meaning: what commands and scripts call the same thing."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest

from trl_sae_audit.callbacks.arguments import AttributionArguments
from trl_sae_audit.cli import main as cli

ROOT = Path(__file__).parents[2]
OTHER_WORDS = {
    "model": ("model_name_or_path", "model_name", "checkpoint"),
    "dataset": ("data", "dataset_name", "texts", "train_file"),
    "dictionary": ("sae", "sae_path", "dict"),
    "output_dir": ("out", "out_dir", "output_directory", "save_dir"),
    "prompts": ("prompt_file", "questions"),
    "seed": ("random_seed",),
}
"""What is called one thing → what it is not called; TRL's own names are aliases."""
ALIASES = {"model": "--model_name_or_path", "dataset": "--dataset_name", "dictionary": "--sae"}


def fields_of(command: str) -> Iterator[Field[Any]]:
    module = importlib.import_module(f"trl_sae_audit.cli.{cli.COMMANDS[command].module}")
    for group in module.OPTIONS:
        yield from fields(group)


def options_of(script: Path) -> Iterator[str]:
    """First names of what `add_argument` adds; the others are kept for those who know them."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(attr="add_argument"), args=[ast.Constant(value=str(name)), *_]):
                yield name


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_uses_the_words_and_knows_those_of_trl(command: str) -> None:
    for field in fields_of(command):
        for word, others in OTHER_WORDS.items():
            assert field.name not in others, f"{field.name} is called {word} elsewhere"
        if field.name in ALIASES:
            assert ALIASES[field.name] in field.metadata["aliases"]
        if field.metadata.get("positional"):  # shown first, without dashes
            help = field.metadata.get("metavar", field.name.upper())
            assert help.isupper()


def test_a_word_has_one_meaning() -> None:
    """An option of several commands is of one type, whatever else it is."""
    types: dict[str, dict[str, str]] = {}
    for command in cli.COMMANDS:
        for field in fields_of(command):
            kind = str(field.type).removesuffix(" | None")
            types.setdefault(field.name, {})[command] = kind
    differing = {name: found for name, found in types.items() if len(set(found.values())) > 1}
    assert differing == {}


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.stem)
def test_a_script_uses_the_same_words(script: Path) -> None:
    unwanted = {f"--{other}": word for word, others in OTHER_WORDS.items() for other in others}
    for option in options_of(script):
        assert option not in unwanted, f"{script.name}: {option} is called --{unwanted.get(option)} elsewhere"
        assert "-" not in option.removeprefix("--"), f"{script.name}: {option} has dashes"


def test_the_training_scripts_share_the_words_of_the_commands() -> None:
    names = {field.name for field in fields(AttributionArguments)}
    assert {"dictionary", "sae_id", "hook_point"} <= names
    assert not names & {other for others in OTHER_WORDS.values() for other in others}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_usage_line_has_what_must_be_given(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    usage = " ".join(printed.split("\n\n")[0].split())
    for field in fields_of(command):
        if field.metadata.get("positional"):
            shown = field.metadata.get("metavar", field.name.upper())
            assert shown in printed
    assert usage.startswith(f"usage: trl-sae-audit {command}")
    assert printed.index("example:") < printed.index("most used:")
    assert printed.index("most used:") < printed.index("general:")
