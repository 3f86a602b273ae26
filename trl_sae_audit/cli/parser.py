"""Options of a command: dataclasses, filled from `--config FILE.yaml` and the command line, which wins.

The conventions are those of TRL's `TrlParser`, whose import takes seconds: `--no_x` next to `--x`, dashes or underscores,
several values after a list's option, `none` where None is allowed.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ..errors import AuditError
from ..io.untrusted import parse_yaml, read_bytes

_BOOLEANS = dict.fromkeys(("true", "yes", "1", "y", "t"), True) | dict.fromkeys(
    ("false", "no", "0", "n", "f"), False
)
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}
_METAVARS = {int: "N", float: "X"}
_CALLED = {
    "DIR": ("audit", "filtered", "verified"),
    "FILE": ("flags", "labels", "influence", "lookahead"),
    "SAE": ("dictionary", "start_from"),
    "ID": ("sae_id", "start_id"),
    "LAYER": ("hook_point", "hook_points"),
    "COLUMN": ("columns", "topic_column", "weight_column"),
    "MODEL": ("judge_model", "reward_model"),
    "TEXT": ("label", "reason", "title", "note", "prompt_separator", "system_positive", "system_negative"),
    "LOSS": ("loss_type",),
    "TRAIT": ("traits",),
    "REPOSITORY": ("push_to_hub",),
}
_CALLED_BY_NAME = {name: called for called, names in _CALLED.items() for name in names}
"""What the value of an option is called in the help, where its own name would say less or leave no room."""
_MARGIN = 26
_WIDEST = 110


def option(help: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of a command's options.

    Args:
        help: a sentence or two.
        default: without one the option is required.
        more: `main=True` for one that the help names first, as it does required ones; `positional=True` for one that may be
            given without its name; `metavar=` for what its value is called; `aliases=` for other names of it; `text=True` for
            words that people write, not a path; `repeatable=True` for a list that grows each time the option is given; `negative=` for the help of `--no_x`, then named in place of `--x`;
            `usual=True` for one that the usage line shows though it is not always required.
    """
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_options(
    command: str,
    description: str,
    example: str,
    groups: Sequence[type],
    argv: Sequence[str],
    known: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    may_be_known: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Instances of the dataclasses `groups`; `--help` prints and exits.

    Args:
        command: its name. description, example: for the help.
        groups: dataclasses.
        argv: what was typed after the command.
        known: what was given → options that an artefact among it knows, used where they were not given.
        may_be_known: their names, so that the help does not call them required.

    Raises:
        AuditError: an option is unknown, missing or has an invalid value; or the file of --config cannot be used.
    """
    parser = make_parser(command, description, example, groups, may_be_known)
    options = parser.options
    given = parser.read_words([_with_underscores(word) for word in argv])
    if "config" in given:
        given = parser.read_file(given.pop("config")) | given
    if known is not None:
        given = {**known(given), **given}
    missing = [each.flag for each in options if each.default is MISSING and each.name not in given]
    if missing:
        parser.error(f"{', '.join(missing)} must be given")
    return tuple(
        group(
            **{each.name: given[each.name] for each in options if each.group is group and each.name in given}
        )
        for group in groups
    )


def make_parser(
    command: str, description: str, example: str, groups: Sequence[type], may_be_known: Sequence[str] = ()
) -> CommandParser:
    """The parser of a command whose options are the fields of the dataclasses `groups`."""
    options = [
        _Option(each, types[each.name], group, each.name in may_be_known)
        for group in groups
        for types in [get_type_hints(group)]
        for each in fields(group)
    ]
    return CommandParser(f"trl-sae-audit {command}", description, example, options)


class _Option:
    """A field as argparse and the help need it."""

    def __init__(self, declared: Field[Any], kind: Any, group: type, may_be_known: bool = False) -> None:
        self.may_be_known = may_be_known
        self.group, self.name, self.default = group, declared.name, declared.default
        if declared.default_factory is not MISSING:
            self.default = declared.default_factory()
        self.optional = get_origin(kind) in (UnionType, Union)  # of a Literal and None it is the second
        if self.optional:
            (kind,) = (member for member in get_args(kind) if member is not NoneType)
        self.many = get_origin(kind) is list
        self.type = get_args(kind)[0] if self.many else kind
        self.choices = get_args(self.type) if get_origin(self.type) is Literal else ()
        metadata = declared.metadata
        self.usual: bool = metadata.get("usual", self.default is MISSING and not may_be_known)
        self.main = metadata.get("main", False) or self.usual or self.default is MISSING
        self.positional: bool = metadata.get("positional", False)
        self.text: bool = metadata.get("text", False)
        self.repeatable: bool = metadata.get("repeatable", False)
        self.names: list[str] = [f"--{declared.name}", *metadata.get("aliases", ())]
        own = self.name.upper() if self.positional else _CALLED_BY_NAME.get(self.name, self.name.upper())
        usual = "|".join(self.choices) or _METAVARS.get(self.type, own)
        if self.name.endswith("_dir"):
            usual = "DIR"
        self.metavar: str = metadata.get("metavar", usual)
        self.flag = self.metavar if self.positional else f"--{self.name}"
        self.help: str = metadata["help"]
        if "negative" in metadata:
            self.flag, self.help = f"--no_{self.name}", metadata["negative"]

    def usage(self) -> str:
        value = f" {self.metavar}" + " …" * self.many
        return value[1:] if self.positional else self.flag if self.type is bool else self.flag + value

    def explanation(self) -> str:
        text = self.help
        if len(self.names) > 1:
            text += f" Also {', '.join(self.names[1:])}."
        if self.may_be_known:
            return f"{text} (default: as the record or the audit says)"
        if self.default not in (MISSING, None, "") and self.type is not bool:
            text += f" (default: {' '.join(self.default) if self.many else self.default})"
        return text

    def convert(self, word: str) -> Any:
        """A value from a word; argparse adds the option's name to what is wrong with it."""
        if self.optional and self.type is not str and word.lower() in ("none", "null"):
            return None
        if self.text:
            return _decode(word)
        known = _BOOLEANS if self.type is bool else {each: each for each in self.choices}
        try:
            return known[word.lower() if self.type is bool else word] if known else self.type(word)
        except (KeyError, ValueError):
            expected = f"one of {', '.join(self.choices)}" if self.choices else _EXPECTED[self.type]
            raise argparse.ArgumentTypeError(f"{word!r} is not {expected}") from None


class CommandParser(argparse.ArgumentParser):
    """argparse, with one-sentence errors and its own help format."""

    def __init__(self, command: str, description: str, example: str, options: Sequence[_Option]) -> None:
        super().__init__(prog=command, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self._intro, self.options = (description, example), options
        self.add_argument("--help", "-h", action="help")
        self.add_argument("--config")
        for each in options:
            if each.type is bool:
                self.add_argument(*each.names, dest=each.name, type=each.convert, nargs="?", const=True)
                self.add_argument(f"--no_{each.name}", dest=each.name, action="store_false")
                continue
            several: dict[str, Any] = {"nargs": "+"} if each.many else {}
            if each.repeatable:
                several["action"] = "extend"
            self.add_argument(*each.names, dest=each.name, type=each.convert, **several)
            if each.positional:
                self.add_argument(
                    each.name, metavar=each.metavar, type=each.convert, nargs="*" if each.many else "?"
                )

    def read_words(self, words: Sequence[str]) -> dict[str, Any]:
        """What was given, by the names of the fields."""
        known, rest = self.parse_known_args(words)
        if rest:
            self.error(f"there is no option {rest[0]}{self._suggestion(rest[0])}")
        return vars(known)

    def read_file(self, path: str) -> dict[str, Any]:
        """What the file of --config gives."""
        words = []
        own = {each.name for each in self.options}
        for name, value in read_config(path).items():
            if f"--{name}" not in self._option_string_actions or name in ("help", "config"):
                self.error(
                    f"{path} has an entry {name!r}, which is not an option of {self.prog}{self._suggestion('--' + name)}"
                )
            if isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            elif name.startswith("no_") and name not in own:
                words.append(f"--{name.removeprefix('no_')}={'false' if value else 'true'}")
            elif value is not None:
                words.append(f"--{name}={value}")
        try:
            return self.read_words(words)
        except AuditError as error:
            raise AuditError(f"{path}: {error}") from error

    def _suggestion(self, word: str) -> str:
        close = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+)[^:]*", r"\1", message)  # argparse names the aliases too
        if not message.endswith("?"):
            message += f"; see {self.prog} --help."
        raise AuditError(message[0].upper() + message[1:])

    def format_help(self) -> str:
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        description, example = self._intro
        usual = [each.usage() for each in self.options if each.usual]
        usage = " ".join(["usage:", self.prog, *usual, "[options]"])
        parts = [
            textwrap.fill(usage, width, subsequent_indent="    ", break_on_hyphens=False),
            _fill(description, width),
            f"example:\n{textwrap.indent(example, '  ')}",
        ]
        rows: dict[str, list[tuple[str, str]]] = {"most used": []}
        for each in self.options:
            title = (
                "most used" if each.main else (each.group.__doc__ or "").split("\n")[0].rstrip(".").lower()
            )
            rows.setdefault(title, []).append((each.usage(), each.explanation()))
        rows.setdefault("general", []).extend(
            [
                (
                    "--config FILE.yaml",
                    "Take options from this file, or those that the audit, SAE … in this directory was made with; those "
                    "on the command line win.",
                ),
                ("--help", "Show this text."),
            ]
        )
        for title, group in rows.items():
            parts.append("\n".join([f"{title}:", *(_row(usage, text, width) for usage, text in group)]))
        return "\n\n".join(parts) + "\n"


def read_config(path: str) -> dict[str, Any]:
    """The options in a file, or those that what is in a directory was made with.

    Raises:
        AuditError: it cannot be read, or is no YAML of names and values.
    """
    if Path(path).is_dir():
        return _saved_options(Path(path))
    try:
        options = parse_yaml(read_bytes(Path(path)))
    except OSError as error:
        raise AuditError(f"The file of --config cannot be read: {error}.") from error
    except ValueError as error:
        raise AuditError(f"The file of --config is not valid YAML of options: {error}.") from error
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise AuditError(
            "The file of --config must contain a YAML mapping of options, such as 'output_dir: runs/audit'."
        )
    for name, value in options.items():
        if any(isinstance(each, Mapping | list) for each in (value if isinstance(value, list) else [value])):
            raise AuditError(f"{name!r} in the file of --config must be one value, or a list of values.")
    return dict(options)


def _saved_options(directory: Path) -> dict[str, Any]:
    from ..io.manifest import read_manifest, stored_files

    manifest = read_manifest(directory, "audit", "filtered", "sae", "verification")
    own = {stored.file for stored in stored_files(manifest)}
    config = manifest.get("config", {})
    return {
        name: str(directory / value) if isinstance(value, str) and value in own else value
        for name, value in config.items()
    }


def _decode(word: str) -> str:
    """Text in UTF-8, also where Python takes the terminal for one of ASCII and hands its bytes on as lone surrogates."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return os.fsencode(word).decode("utf-8", "replace")
    return word


def _with_underscores(word: str) -> str:
    """`--max-rows=3` as `--max_rows=3`."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _row(usage: str, text: str, width: int) -> str:
    margin = " " * _MARGIN
    body = _fill(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    head = f"  {usage}"
    return head.ljust(_MARGIN) + body[_MARGIN:] if len(head) < _MARGIN - 1 else f"{head}\n{body}"


def _fill(text: str, width: int, **options: Any) -> str:
    """Lines of a text, none of which ends between a number and what belongs to it."""
    held = re.sub(r"(?<=default:) (?=\S+\))|(?<=default) (?=[\d.]+\b)|(?<=\d) (?=%)", _HELD, text)
    return textwrap.fill(held, width, **options).replace(_HELD, " ")


_HELD = "\u00a0"
