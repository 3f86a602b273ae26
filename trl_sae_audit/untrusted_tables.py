"""Tables and arrays that others wrote: what a file claims is held against the file and the machine before it is read.

As in `untrusted`, every function raises ValueError, or OSError for a file that cannot be opened, with a phrase.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from .untrusted import check_fits, check_regular, parse_json

_DTYPES = frozenset({"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"})


def iterate_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as dicts, some hundred of them in memory at a time.

    Texts are read as the distinct ones and places among them, and written out once it is known that they fit: a file of some
    kilobytes may hold a hundred thousand rows with the same long text.
    """
    with _refusing(), _opened(path) as file:
        for group in range(file.metadata.num_row_groups):
            check_fits(f"its row group {group}", _values(file.metadata.row_group(group)))
        for batch in file.iter_batches(256):
            yield from _plain(pa.Table.from_batches([batch])).to_pylist()


def read_parquet(source: Path | bytes, *, rows: int | None = None, columns: Iterable[str] = ()) -> pa.Table:
    """A whole Parquet file, checksums and all.

    Args:
        source: its path, or its content.
        rows: as many as the manifest of its directory says it has, if there is one.
        columns: those it must have.
    """
    with _refusing(), _opened(source) as file:
        claimed = file.metadata.num_rows
        if rows is not None and claimed != rows:
            raise ValueError(f"it has {claimed} rows where the manifest says {rows}")
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        groups = range(file.metadata.num_row_groups)
        check_fits("its rows", sum(_values(file.metadata.row_group(group)) for group in groups))
        return _plain(file.read())


def read_frame(source: Path | bytes, *, rows: int | None = None, columns: Iterable[str] = ()) -> Any:
    """The same as a DataFrame."""
    return read_parquet(source, rows=rows, columns=columns).to_pandas(ignore_metadata=True)


@contextmanager
def _opened(source: Path | bytes) -> Iterator[pq.ParquetFile]:
    if isinstance(source, Path):
        check_regular(source)
    handle = pa.OSFile(str(source)) if isinstance(source, Path) else pa.BufferReader(source)
    with handle, pq.ParquetFile(handle) as file:
        texts = _text_columns(file)
        handle.seek(0)
        with pq.ParquetFile(handle, read_dictionary=texts, page_checksum_verification=True) as checked:
            yield checked


def _text_columns(file: pq.ParquetFile) -> list[str]:
    """Paths of the columns of text, alone or in lists and structs; in maps and the like a text is read as it stands."""
    simple = [field.name for field in file.schema_arrow if _is_simple(field.type)]
    paths = [
        column.path
        for column in map(file.schema.column, range(len(file.schema)))
        if column.physical_type == "BYTE_ARRAY"
    ]
    return [path for path in paths if any(path == name or path.startswith(f"{name}.") for name in simple)]


def _is_simple(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _is_simple(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_simple(field.type) for field in kind)
    return not pa.types.is_nested(kind)


def _values(group: pq.RowGroupMetaData) -> int:
    """Bytes that a row group takes as it is read: a text counts as its place among the distinct ones."""
    return 8 * sum(group.column(place).num_values for place in range(group.num_columns))


def _plain(table: pa.Table) -> pa.Table:
    """Every text in its place."""
    table.validate(full=True)
    check_fits(
        "its texts", 4 * sum(_written_out(chunk) for column in table.columns for chunk in column.chunks)
    )
    return table.cast(pa.schema([pa.field(each.name, _plain_type(each.type)) for each in table.schema]))


def _written_out(array: pa.Array) -> int:
    """Bytes of an array's texts when each stands on its own."""
    if isinstance(array, pa.DictionaryArray):
        values, places = array.dictionary, array.indices.drop_null()
        if not (pa.types.is_string(values.type) or pa.types.is_binary(values.type)):
            return 0
        return pc.sum(pc.binary_length(values).take(places)).as_py() or 0
    if pa.types.is_list(array.type):
        return _written_out(array.flatten())
    return sum(map(_written_out, array.flatten())) if isinstance(array, pa.StructArray) else 0


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(each.name, _plain_type(each.type)) for each in kind])
    return kind


def read_arrays(
    source: Path | bytes, names: Iterable[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of a safetensors file, and its metadata.

    The library itself holds the header against the length of the file, so that an array is never larger than what lies there.

    Args:
        source: its path, or its content (of which the metadata is left out).
        names: those wanted; all by default.
    """
    with _refusing():
        if isinstance(source, bytes):
            return load_safetensors(source), {}
        check_regular(source)
        with safe_open(source, framework="np") as file:
            found = file.keys()
            wanted = list(found) if names is None else list(names)
            missing = [name for name in wanted if name not in found]
            if missing:
                raise ValueError(f"it has no array {missing[0]!r}")
            for name in wanted:
                if file.get_slice(name).get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{name!r} is of type {file.get_slice(name).get_dtype()}, which is not used here"
                    )
            return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}


def sealed(arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> bytes:
    """A safetensors file of arrays and a description, with a CRC-32 of both: against accidents, not against tampering."""
    described = {**description, "crc32": checksum_of(arrays, description)}
    # one entry: safetensors writes several in an order that changes from process to process
    return save_safetensors(dict(arrays), {"part": json.dumps(described, sort_keys=True)})


def unsealed(path: Path, names: Sequence[str] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `sealed` wrote: arrays and description. The checksum is held against them if all arrays are asked for; a file
    written before there were checksums has none."""
    arrays, metadata = read_arrays(path, names)
    described = parse_json(metadata.get("part", "{}"))
    if not isinstance(described, dict):
        raise ValueError("its description is no object")
    written = described.pop("crc32", None)
    if names is None and written is not None and written != checksum_of(arrays, described):
        raise ValueError("its checksum is not that of its content")
    return arrays, described


def checksum_of(arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> int:
    """CRC-32 of arrays, with their names, types and shapes, and of what is said of them."""
    crc = zlib.crc32(json.dumps(description, sort_keys=True).encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        crc = zlib.crc32(f"{name} {values.dtype.str} {arrays[name].shape}".encode(), crc)
        crc = zlib.crc32(values.reshape(-1).view(np.uint8).data, crc)
    return crc


@contextmanager
def _refusing() -> Iterator[None]:
    """The libraries' ways of saying that a file is broken, as ValueError."""
    try:
        yield
    except (pa.ArrowException, SafetensorError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(" ".join(str(error).split())) from error
