"""Tables and arrays that others wrote: a file's claims are compared with the file and the machine before it is read.

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


def read_parquet(source: Path | bytes, *, rows: int | None = None, columns: Iterable[str] = ()) -> pa.Table:
    """A whole Parquet file, checksums and all.

    Texts are read as the distinct ones and places among them, and written out once it is known that they fit: a file of some
    kilobytes may hold a hundred thousand rows with the same long text.

    Args:
        source: its path, or its content.
        rows: as many as the manifest of its directory says it has, if there is one.
        columns: those it must have, none of lists.
    """
    with _refusing():
        if isinstance(source, Path):
            check_regular(source)
        schema = pq.read_schema(source if isinstance(source, Path) else pa.BufferReader(source))
        missing = [name for name in columns if name not in schema.names]
        if missing or any(map(pa.types.is_nested, schema.types)):
            raise ValueError(f"it has no column {missing[0]!r}" if missing else "it has a column of lists")
        content = source if isinstance(source, Path) else pa.BufferReader(source)
        with pq.ParquetFile(content, read_dictionary=schema.names, page_checksum_verification=True) as file:
            claims = file.metadata
            if rows is not None and claims.num_rows != rows:
                raise ValueError(f"it has {claims.num_rows} rows where the manifest says {rows}")
            check_fits("its rows", 8 * claims.num_rows * claims.num_columns)
            # By batches: `read` trusts each column's own count, and asking for that count ends the process where a column's
            # size statistics are damaged (pyarrow does not catch what Parquet throws there).
            table = pa.Table.from_batches(file.iter_batches(), file.schema_arrow)
        if table.num_rows != claims.num_rows:
            raise ValueError(f"it has {table.num_rows} rows where it says {claims.num_rows}")
        table.validate(full=True)
        check_fits(
            "its texts", 4 * sum(_text_bytes(chunk) for column in table.columns for chunk in column.chunks)
        )
        return table.cast(schema)


def _text_bytes(array: pa.Array) -> int:
    """Bytes of an array's texts when each is written out."""
    if not isinstance(array, pa.DictionaryArray):
        return 0
    return pc.sum(pc.binary_length(array.dictionary).take(array.indices.drop_null())).as_py() or 0


def read_frame(source: Path | bytes, *, rows: int | None = None, columns: Iterable[str] = ()) -> Any:
    """The same as a DataFrame."""
    return read_parquet(source, rows=rows, columns=columns).to_pandas(ignore_metadata=True)


def read_arrays(
    source: Path | bytes, names: Iterable[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of a safetensors file, and its metadata.

    The library itself compares the header with the length of the file, so an array is never larger than the file.

    Args:
        source: its path, or its content (without the metadata).
        names: those wanted; all by default.
    """
    with _refusing():
        if isinstance(source, bytes):
            return load_safetensors(source), {}
        check_regular(source)
        with safe_open(source, framework="np") as file:
            present = file.keys()
            wanted = list(present) if names is None else list(names)
            missing = [name for name in wanted if name not in present]
            if missing:
                raise ValueError(f"it has no array {missing[0]!r}")
            for name in wanted:
                if file.get_slice(name).get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{name!r} is of type {file.get_slice(name).get_dtype()}, which is not used here"
                    )
            return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}


def save_checked(arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> bytes:
    """A safetensors file of arrays and a description, with a CRC-32 of both: against accidents, not against tampering."""
    described = {**description, "crc32": checksum_of(arrays, description)}
    # one entry: safetensors writes several in an order that changes from process to process
    return save_safetensors(dict(arrays), {"part": json.dumps(described, sort_keys=True)})


def load_checked(
    path: Path, names: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `save_checked` wrote: arrays and description. The checksum is verified if all arrays are read."""
    arrays, metadata = read_arrays(path, names)
    described = parse_json(metadata.get("part", "{}"))
    if not isinstance(described, dict):
        raise ValueError("its description is not an object")
    written = described.pop("crc32", None)
    if names is None and written != checksum_of(arrays, described):
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
