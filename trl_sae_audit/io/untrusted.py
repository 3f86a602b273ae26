"""Reading files that others wrote: nothing in them is run, no path leads out, no claim of theirs is allocated unseen.

Every function here raises ValueError (or OSError) with a phrase that says what is wrong; the reader that calls it makes the
sentence, with the file's name and what to do.
"""

from __future__ import annotations

import json
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

_LARGEST_TEXT = 2**30
"""Bytes of JSON read at most: a gigabyte, well above an evidence file of thousands of features."""
_LARGEST_YAML = 2**20
_MOST_NODES = 100_000
"""Nodes of a YAML document with its aliases written out."""
_DEEPEST = 64
"""Levels of lists in lists: beyond what anybody means, and far below what Python can recurse into."""


def read_bytes(path: Path, most: int = _LARGEST_TEXT) -> bytes:
    """The content of a regular file; a pipe or a device, which may never end, is refused.

    Raises:
        OSError: it cannot be read. ValueError: it is not a regular file, or larger than `most` bytes.
    """
    # opened before it is looked at, so that both are of one file where another takes its place; a pipe does not make it wait
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        size = _size_of_regular(os.fstat(file.fileno()))
        if size > most:
            raise ValueError(f"it has {size:,} bytes, and at most {most:,} are read")
        return file.read(size)


def check_regular(path: Path) -> int:
    """The size of a regular file; ValueError for anything else, OSError where nothing is."""
    return _size_of_regular(path.stat())


def _size_of_regular(status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    return status.st_size


def read_json(path: Path) -> Any:
    """The JSON in a file, see `parse_json`."""
    return parse_json(read_bytes(path))


def parse_json(content: bytes | str) -> Any:
    """JSON in which no name appears twice in an object, nested no deeper than 64.

    Raises:
        ValueError: it is none, or is not UTF-8.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_size(value, _parts_of_value)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears in it twice")
    return unique


def _check_size(root: Any, parts: Callable[[Any], Iterable[Any]], most: int = sys.maxsize) -> None:
    """Refuse, with a ValueError, what is nested deeper than 64 levels, or has more than `most` values when written out."""
    level, left = [root], most
    for _ in range(_DEEPEST):
        level = list(islice(chain.from_iterable(map(parts, level)), left))
        left -= len(level)
        if not level:
            return
        if not left:
            raise ValueError(f"it has more than {most:,} values")
    raise ValueError(f"it is nested deeper than {_DEEPEST} levels")


def _parts_of_value(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_yaml(content: bytes | str) -> Any:
    """YAML of plain values in which no key appears twice; aliases are understood, but not a tower of them.

    Raises:
        ValueError: it is none, is not UTF-8, or too large, deep, or large once its aliases are written out.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    if len(text) > _LARGEST_YAML:
        raise ValueError(f"it has {len(text):,} characters, and at most {_LARGEST_YAML:,} are read")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, _parts_of_node, _MOST_NODES)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (AttributeError, KeyError, TypeError, OverflowError) as error:  # `!!timestamp x`, `!!bool x` …
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {error})") from error


def _parts_of_node(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise ValueError(f"{key.value!r} appears in it twice (line {key.start_mark.line + 1})")
                seen.add(key.value)
            yield from (key, value)


def is_inside(directory: Path, file: str) -> bool:
    """Whether `file`, a path that stood in some file, is one in `directory`, also once links are followed."""
    if "\0" in file or Path(file).is_absolute():
        return False
    try:
        (directory / file).exists()
        return (directory / file).resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links; a name too long or not to be encoded
        return False


def check_fits(what: str, n_bytes: int) -> None:
    """Refuse, with a ValueError, what is claimed to need more memory than this process may have."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    limit = machine if allowed == resource.RLIM_INFINITY else min(machine, allowed)
    if n_bytes > limit:
        raise ValueError(
            f"{what} would take {n_bytes / 2**30:,.1f} GiB, and there are {limit / 2**30:,.1f} in all"
        )
