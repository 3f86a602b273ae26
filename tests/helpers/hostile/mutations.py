"""Ways to break a file: blindly, byte by byte, or knowing what it is."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Mutation = Callable[[bytes, Random], bytes]

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**53 + 1, 2**63, 10**12, 10**400, -0.0, 1e308, float("nan"), float("inf"),
    "", "\x00", "\x1b[31mred\x07", "\ud800", "\u202e", "../../../etc/passwd", "/etc/passwd", "a" * 5000,
    "steps", "NaN", [], {}, [[]], {"": {}}, ["a", 1], [0] * 50, {"__class__": "os.system"},
]  # fmt: skip
"""Values that stand where something else is expected."""


def flip(content: bytes, rng: Random) -> bytes:
    """One to four bits."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def cut_out(content: bytes, rng: Random) -> bytes:
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:start] + content[end:]


def repeat(content: bytes, rng: Random) -> bytes:
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[start:end] * rng.randint(1, 3) + content[end:]


def insert(content: bytes, rng: Random) -> bytes:
    pieces = [
        b"\x00",
        b"\xff" * 8,
        b"\x1b[2J",
        b"\xed\xa0\x80",
        b"[" * 3000,
        b"9" * 5000,
        b'"',
        b"\n",
        rng.randbytes(16),
    ]
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(pieces) + content[at:]


def overwrite(content: bytes, rng: Random) -> bytes:
    """A number somewhere that claims a great deal."""
    at = rng.randrange(max(1, len(content)))
    claim = rng.choice(
        [struct.pack("<q", 10**12), struct.pack("<i", 2**31 - 1), struct.pack("<q", -1), b"\xff" * 4]
    )
    return content[:at] + claim + content[at + len(claim) :]


BLIND: list[Mutation] = [flip, flip, truncate, cut_out, repeat, insert, overwrite]


def changed_value(value: Any, rng: Random) -> Any:
    """JSON-like data with one thing in it, anywhere, replaced, left out, doubled or moved to another name."""
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return rng.choice(HOSTILE)
    holder, key = rng.choice(places)
    choice = rng.random()
    if choice < 0.6:
        holder[key] = rng.choice(HOSTILE)
    elif choice < 0.75:
        del holder[key]
    elif choice < 0.9:
        other, name = rng.choice(places)
        holder[key] = (
            json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None
        )
    elif isinstance(holder, dict):
        holder[rng.choice(["", "x", "\x00", str(key).upper(), str(key) + "_"])] = holder.pop(key)
    else:
        holder.insert(key, holder[key])
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        holder = left.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            found.append((holder, key))
            left.append(holder[key])
    return found


def json_value(content: bytes, rng: Random) -> bytes:
    """One value, in JSON or in one of several lines of it."""
    text = content.decode()
    try:
        return json.dumps(changed_value(json.loads(text), rng)).encode()
    except json.JSONDecodeError:
        lines = text.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(changed_value(json.loads(lines[at]), rng))
        return "\n".join(lines).encode()


def json_twice(content: bytes, rng: Random) -> bytes:
    """A name twice in the outermost object, or the whole in many brackets."""
    text = content.decode().strip()
    if rng.random() < 0.3:
        depth = rng.choice([70, 2000, 100_000])
        return ("[" * depth + text + "]" * depth).encode()
    return text.replace("{", '{"version": 7, "schema": 3, "chosen": 1, ', 1).encode()


def yaml_value(content: bytes, rng: Random) -> bytes:
    """One value, written so that YAML reads it back as it is, or as another tag."""
    changed = changed_value(yaml.safe_load(content), rng)
    text = json.dumps(changed)  # YAML's flow style, nearly
    tags = [
        "!!timestamp x",
        "!!bool x",
        "!!int x",
        "!!python/object/apply:os.getpid []",
        "!!binary x",
        "2001-99-99",
        "*a",
    ]
    if rng.random() < 0.3:
        text = text.replace("null", rng.choice(tags)).replace("1.0", rng.choice(tags))
    return text.encode("utf-8", errors="surrogatepass")


def yaml_tower(content: bytes, rng: Random) -> bytes:
    """Aliases of aliases, a billion laughs."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, rng.randint(3, 12))]
    return content + "\n".join(rows).encode() + b"\n"


def safetensors_header(content: bytes, rng: Random) -> bytes:
    """One value in the header, or the header's length."""
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.15:
        return struct.pack("<Q", rng.choice([0, 1, length + 8, 10**8, 2**63, len(content)])) + content[8:]
    header = json.dumps(changed_value(json.loads(content[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def parquet_table(content: bytes, rng: Random) -> bytes:
    """Another table where the first was: a column of another type, name or number, rows more or less."""
    table = pq.read_table(io.BytesIO(content))
    at = rng.randrange(table.num_columns)
    name, rows = table.column_names[at], table.num_rows
    columns = [
        pa.array([rng.choice([None, "x", "\x1b[0m"])] * rows, pa.string()),
        pa.array([float("nan")] * rows),
        pa.array([2**62] * rows),
        pa.array([-1] * rows, pa.int64()),
        pa.array([[1, 2]] * rows, pa.list_(pa.int64())),
        pa.array([b"\xff"] * rows, pa.binary()),
        pa.nulls(rows),
    ]
    choice = rng.randrange(6)
    if choice == 0:
        table = table.drop_columns([name])
    elif choice == 1:
        table = table.rename_columns([f"{each}x" if each == name else each for each in table.column_names])
    elif choice == 2:
        table = table.slice(rng.randrange(rows + 1))
    elif choice == 3:
        table = pa.concat_tables([table] * rng.randint(2, 3))
    else:
        table = table.set_column(at, name, rng.choice(columns))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def parquet_footer(content: bytes, rng: Random) -> bytes:
    """Bits of the metadata at the end, which says where everything lies and how much of it there is."""
    length = int.from_bytes(content[-8:-4], "little")
    start = max(0, len(content) - 8 - length)
    return content[:start] + rng.choice([flip, overwrite, cut_out])(content[start:], rng)


def mutations_for(file: Path) -> list[Mutation]:
    """Blind ones, and those that know the kind of file."""
    if file.suffix in (".json", ".jsonl"):
        return [*BLIND, *[json_value] * 10, json_twice]
    if file.suffix in (".yaml", ".yml"):
        return [*BLIND, *[yaml_value] * 10, yaml_tower]
    if file.suffix == ".safetensors":
        return [*BLIND, *[safetensors_header] * 8]
    if file.suffix == ".parquet":
        return [*BLIND, *[parquet_table] * 3, *[parquet_footer] * 3]
    return BLIND
