"""The command line: `trl-sae-audit COMMAND`. Imports nothing heavy until a command runs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .. import __version__
from ..errors import AuditError
from ..text import sanitize
from .parser import parse_options

USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    """A command: its module in `trl_sae_audit.cli`, whose `run(*OPTIONS)` returns the exit code."""

    module: str
    help: str


COMMANDS = {
    "audit": Command("audit", "which features would this preference data teach?"),
    "label": Command("label", "what features are about: labels, fetched or made, and scored"),
    "flag": Command("flag", "mark a feature of an audit as one that should not be taught"),
    "filter": Command("filter", "remove, flip or weight the pairs that teach flagged features"),
    "verify": Command("verify", "did the scores predict what training did to the features?"),
    "diff": Command("diff", "two checkpoints: which features rose and fell?"),
    "report": Command("report", "one HTML file about a run or an audit, to look at"),
    "compare": Command("compare", "several runs side by side: behaviour and features"),
    "train-sae": Command("train_sae", "train a dictionary for your own model, on your own texts"),
    "direction": Command("direction", "directions of traits from pairs of answers, where there is no SAE"),
    "doctor": Command("doctor", "does this dictionary fit this model, and which trainers will work?"),
    "cost": Command("cost", "what would attribution cost this run?"),
    "demo": Command("demo", "the whole loop on a small model made on the spot"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the answer is no, 2 it could not be done."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(top_level_help())
        return 0
    if arguments[0] == "--version":
        print(f"trl-sae-audit {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--completion":
        from .completion import completion_script

        try:
            modules = {command: (each.module, each.help) for command, each in COMMANDS.items()}
            print(completion_script(" ".join(rest), modules))
        except AuditError as error:
            return _fail(str(error))
        return 0
    if name not in COMMANDS:
        return _fail(_describe_unknown(name))
    from ..console import replace_unencodable, silence_libraries

    replace_unencodable()
    try:
        module = importlib.import_module(f".{COMMANDS[name].module}", __package__)
        known = vars(module).get("KNOWN", {})
        options = parse_options(name, module.DESCRIPTION, module.EXAMPLE, module.OPTIONS, rest, **known)
        with silence_libraries():
            return module.run(*options)
    except AuditError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("Stopped.")


def top_level_help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: trl-sae-audit COMMAND [options]",
            "",
            "See what a reward really teaches: which sparse-autoencoder features every",
            "optimizer step of a TRL run up- or down-weights.",
            "",
            "commands:",
            *lines,
            "",
            "every command:",
            "  --help              its options",
            "  --config FILE.yaml  options from a file; those on the command line win",
            "  --json              one JSON document instead of text and tables",
            "",
            "trl-sae-audit --version says which version this is; --completion SHELL (bash,",
            "zsh, tcsh) prints a script with which it completes commands and options.",
            "",
            "exit code: 0 done, 1 the answer is no, 2 it could not be done; then one sentence",
            "on stderr says why.",
        ]
    )


def _describe_unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}."
    return f"There is no command {name!r}; {hint}"


def _fail(message: str) -> int:
    print(f"trl-sae-audit: {sanitize(message)}", file=sys.stderr)
    return USAGE_ERROR
