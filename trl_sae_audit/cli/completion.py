"""`trl-sae-audit --completion SHELL`: what a shell needs to complete commands and their options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping

from ..errors import AuditError
from .parser import make_parser

SHELLS = ("bash", "zsh", "tcsh")


def completion_script(shell: str, commands: Mapping[str, tuple[str, str]]) -> str:
    """A script for the shell, written by shtab.

    Args:
        shell: one of SHELLS.
        commands: name → its module in this package, and what it does.

    Raises:
        AuditError: another shell, or shtab is not installed.
    """
    if shell not in SHELLS:
        raise AuditError(f"There is no completion for {shell!r}; give one of {', '.join(SHELLS)}.")
    try:
        import shtab
    except ImportError:
        raise AuditError("Completion scripts are written by shtab; pip install shtab.") from None
    root = argparse.ArgumentParser("trl-sae-audit")
    below = root.add_subparsers()
    for name, (module_name, help) in commands.items():
        module = importlib.import_module(f".{module_name}", __package__)
        parser = make_parser(name, module.DESCRIPTION, module.EXAMPLE, module.OPTIONS)
        below.add_parser(name, parents=[parser], add_help=False, help=help)
    for command in below.choices.values():
        for action in command._actions:
            if action.choices is None and action.nargs != 0 and action.const is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(root, shell)
