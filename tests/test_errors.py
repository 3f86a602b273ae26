"""Errors are sentences, and the package imports itself one way: what the linters have no rule for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trl_sae_audit
from trl_sae_audit import errors

PACKAGE = Path(trl_sae_audit.__file__).parent
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
ERRORS = {name for name, each in vars(errors).items() if isinstance(each, type)}


def _names(node: ast.AST) -> list[str]:
    match node:
        case ast.arg(arg=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


ARGUMENTS = {name for tree in TREES.values() for node in ast.walk(tree) for name in _names(node)} - {"a"}
"""Names of arguments and fields: an error may begin with one, as the user typed it."""


def _texts(node: ast.expr) -> Iterator[str]:
    """What an expression can say, with `{}` for what is put in later."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
        case ast.BinOp(left=left, right=right):
            yield from (first + second for first in _texts(left) for second in _texts(right))
        case ast.IfExp(body=body, orelse=other):
            yield from (*_texts(body), *_texts(other))
        case _:
            yield "{}"


def _messages() -> Iterator[tuple[str, str]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                yield from ((f"{path}:{node.lineno}", text) for text in _texts(node.args[0]))


def _is_sentence(text: str) -> bool:
    first = text.split()[0].rstrip("=")
    return (text[0].isupper() or text[0] == "{" or first.startswith("--") or first in ARGUMENTS) and (
        text.endswith((".", "{}"))
    )


def test_every_error_is_a_sentence() -> None:
    messages = list(_messages())
    assert len(messages) > 300
    assert not [f"{place}: {text}" for place, text in messages if not _is_sentence(text)]


@pytest.mark.parametrize(
    ("text", "is_sentence"),
    [
        ("The file is empty.", True),
        ("{} is empty.", True),
        ("--every is 0; give more.", True),
        ("budget is 2.5; give a share.", True),
        ("The model cannot be loaded: {}", True),  # with the words of who refused it
        ("the file is empty.", False),
        ("The file is empty", False),
    ],
)
def test_what_a_sentence_is(text: str, is_sentence: bool) -> None:
    assert _is_sentence(text) == is_sentence


def test_the_package_imports_itself_relatively() -> None:
    absolute = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] == PACKAGE.name
        )
        or (
            isinstance(node, ast.Import)
            and any(name.name.split(".")[0] == PACKAGE.name for name in node.names)
        )
    ]
    assert not absolute
