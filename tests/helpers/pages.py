"""The pages of the documentation, their code blocks, and how a shell line is held against the real parsers.

What a comment above a block says, on a line of its own:

    <!-- not run: REASON -->    Python is only compiled, a shell block not looked at
    <!-- TRL 1.12 -->           run in the environment with PPO only

and what needs no showing is run from a comment of its own:

    <!-- setup
    my_reward = reward_by_length
    -->
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser
from trl import TrlParser

from trl_sae_audit import AuditError
from trl_sae_audit.cli import main as cli
from trl_sae_audit.cli.parser import parse_options

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SKILL.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

SHELLS = ("sh", "bash", "shell")
OTHER_PROGRAMS = {"cd", "git", "tensorboard", "trackio", "wandb", "mkdocs", "export", "ruff", "mypy"}
"""What a shell block may also call; its options are not looked at."""

BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|TRL 1\.12)(?:: (?P<reason>[^\n]+?))? -->\n\n?)?"
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    flags=re.DOTALL | re.MULTILINE,
)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*python scripts/[^`…]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block, or a hidden set-up."""

    page: Path
    line: int
    language: str
    code: str
    mark: Literal["not run", "TRL 1.12"] | None = None
    reason: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page from top to bottom."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        group = "code" if match["setup"] is None else "setup"
        line = text.count("\n", 0, match.start(group)) + 1
        language = match["language"] if match["setup"] is None else "python"
        found.append(Block(page, line, language, match[group], match["mark"], match["reason"]))
    return found


def inline_commands(page: Path) -> list[str]:
    """Commands in the running text, such as those beside a figure."""
    return [" ".join(found.split()) for found in INLINE.findall(page.read_text(encoding="utf-8"))]


def shell_lines(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, as words."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in re.split(r" && | \| ", line):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command by the program's own parser, without running it.

    Raises:
        LineError: the program does not take these options, or there is no such program.
    """
    program, arguments = words[0], words[1:]
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        program, arguments = launched.training_script, launched.training_script_args
    elif program == "torchrun":
        launched = torchrun_parser().parse_args(arguments)
        program, arguments = launched.training_script, launched.training_script_args
    elif program == "python":
        program, arguments = words[1], words[2:]
        if program == "-m":
            return
    if program == "trl-sae-audit":
        _check_command(arguments)
    elif program.startswith("scripts/"):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.syspath_prepend(str((ROOT / program).parent))
        _parse_only(lambda: runpy.run_path(str(ROOT / program), run_name="__main__"), monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        _require(set(arguments) <= set(targets), f"make has no target {arguments}")
    elif program == "pip":
        _check_pip(arguments)
    else:
        _require(program in OTHER_PROGRAMS, f"{program} is not a program the documentation may call")


class LineError(AssertionError):
    """A line of the documentation that would not work."""


class _Parsed(Exception):  # noqa: N818
    """The program has read its options, and is stopped here."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LineError(message)


def all_known(module: Any) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """As if the artefact that a command names knew all that it may know."""
    return lambda given: dict.fromkeys(vars(module).get("KNOWN", {}).get("may_be_known", ()), "known")


def _check_command(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "--version"):
        return
    _require(arguments[0] in cli.COMMANDS, f"there is no command {arguments[0]}")
    module = importlib.import_module(f"trl_sae_audit.cli.{cli.COMMANDS[arguments[0]].module}")
    try:
        parse_options(arguments[0], "", "", module.OPTIONS, arguments[1:], known=all_known(module))
    except AuditError as error:
        raise LineError(str(error)) from error
    except SystemExit as stopped:  # --help
        _require(stopped.code == 0, "refused")


def _check_pip(arguments: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for word in arguments:
        asked = re.fullmatch(r"(?:\.|trl-sae-audit)\[(.+)\]", word)
        for extra in asked[1].split(",") if asked else ():
            _require(re.search(rf"^{extra} = \[", text, re.MULTILINE) is not None, f"no extra {extra}")
        if word.startswith("constraints"):
            _require((ROOT / word).is_file(), f"no file {word}")


def _parse_only(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from_files, from_words = TrlParser.parse_args_and_config, argparse.ArgumentParser.parse_args

    def parse_args_and_config(parser: TrlParser, args: list[str] | None = None, **options: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if any(action.dest == "use_cpu" for action in parser._actions):
            words += ["--use_cpu", "--bf16", "false"]  # the test machine need not have the reader's GPU
        from_files(parser, words, **options)
        raise _Parsed

    def parse_args(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        from_words(parser, *args, **options)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(TrlParser, "parse_args_and_config", parse_args_and_config)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            code = run()
        except _Parsed:
            return
        except SystemExit as stopped:
            raise LineError(f"refused: exit {stopped.code}") from stopped
    _require(code == 0, "refused")
