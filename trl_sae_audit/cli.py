"""The command line: `trl-sae-audit COMMAND`. Imports nothing heavy until a command runs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from . import __version__
from .errors import AuditError
from .visible_text import visible

USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    """A command: its module in `trl_sae_audit.commands`, whose `main(argv)` returns the exit code."""

    module: str
    help: str


COMMANDS = {
    "audit": Command("audit", "which features would this preference data teach?"),
    "flag": Command("flag", "mark a feature of an audit as one that should not be taught"),
    "filter": Command("filter", "remove, flip or weight the pairs that teach flagged features"),
    "verify": Command("verify", "did the scores predict what training did to the features?"),
    "report": Command("report", "one HTML file about a run or an audit, to look at"),
    "compare": Command("compare", "several runs side by side: behaviour and features"),
    "train-sae": Command("train_sae", "train a dictionary for your own model, on your own texts"),
    "doctor": Command("doctor", "does this dictionary fit this model, and which trainers will work?"),
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
    if name not in COMMANDS:
        return _fail(_unknown(name))
    from .terminal import quiet

    try:
        with quiet():
            module = importlib.import_module(f".commands.{COMMANDS[name].module}", __package__)
            return module.main(rest)
    except AuditError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("stopped")


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
            "trl-sae-audit --version says which version this is.",
            "",
            "exit code: 0 done, 1 the answer is no, 2 it could not be done; then one sentence",
            "on stderr says why.",
        ]
    )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}."
    return f"there is no command {name!r}; {hint}"


def _fail(message: str) -> int:
    print(f"trl-sae-audit: {visible(message)}", file=sys.stderr)
    return USAGE_ERROR
