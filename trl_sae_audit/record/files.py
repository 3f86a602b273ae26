"""The files of a run record."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from ..attribution.totals import FeatureTotals
from ..io.manifest import StoredFile, damaged, reading
from ..io.tables import read_arrays, read_parquet


def parse_part(path: Path, stored: StoredFile, content: bytes) -> pa.Table:
    """The rows of one part.

    Raises:
        AuditError: not a Parquet file, or not with as many rows as the manifest says.
    """
    with reading(path):
        return read_parquet(content, rows=stored.rows)


def parse_totals(path: Path, stored: StoredFile, content: bytes) -> FeatureTotals:
    """The totals of one dictionary.

    Raises:
        AuditError: not a safetensors file, not one of totals, or not with as many features as the manifest says.
    """
    try:
        totals = FeatureTotals.from_state(read_arrays(content)[0])
        if totals.n_features != stored.rows:
            raise ValueError(f"it has {totals.n_features} features where the manifest says {stored.rows}")
    except (ValueError, OSError) as error:
        raise damaged(path, error) from error
    return totals


def encode(part: pa.Table | FeatureTotals) -> tuple[str, bytes, int]:
    """The ending and the content of a file for it, and its rows, or its features."""
    if isinstance(part, FeatureTotals):
        return "safetensors", save(part.state_dict()), part.n_features
    sink = pa.BufferOutputStream()
    pq.write_table(part, sink, compression="zstd")
    return "parquet", sink.getvalue().to_pybytes(), part.num_rows
