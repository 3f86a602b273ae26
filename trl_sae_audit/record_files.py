"""The files of a run record: checked when they are read, whole or absent when they are written."""

import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trl_sae_audit.errors import AuditError
from trl_sae_audit.record_manifest import StoredFile
from trl_sae_audit.totals import FeatureTotals
from trl_sae_audit.untrusted_tables import read_arrays, read_parquet, sealed, unsealed


def check_content(path: Path, stored: StoredFile, content: bytes) -> None:
    """Refuse, with an AuditError, content that is not what the manifest says was written."""
    check_size(path, stored, len(content))
    if checksum(content) != stored.crc32:
        raise AuditError(
            f"{path} is corrupt, its checksum is not the manifest's: restore it from a copy or delete the record."
        )


def check_size(path: Path, stored: StoredFile, size: int) -> None:
    """The same of its length, before it is read."""
    if size != stored.bytes:
        raise AuditError(
            f"{path} has {size} bytes where the manifest says {stored.bytes}: it was truncated or changed, "
            "so restore it from a copy or delete the record."
        )


def parse_part(path: Path, stored: StoredFile, content: bytes) -> pa.Table:
    """The rows of one part.

    Raises:
        AuditError: not a Parquet file, or not with as many rows as the manifest says.
    """
    try:
        return read_parquet(content, rows=stored.rows)
    except (ValueError, OSError) as error:
        raise AuditError(
            f"{path} is not a readable Parquet file ({error}): restore it from a copy."
        ) from error


def parse_totals(path: Path, stored: StoredFile, content: bytes) -> FeatureTotals:
    """The totals of one dictionary.

    Raises:
        AuditError: not a safetensors file, not one of totals, or not with as many features as the manifest says.
    """
    try:
        totals = FeatureTotals.from_state(read_arrays(content)[0])
    except (ValueError, OSError) as error:
        raise AuditError(
            f"{path} is not a readable file of totals ({error}): restore it from a copy."
        ) from error
    if totals.n_features != stored.rows:
        raise AuditError(
            f"{path} has {totals.n_features} features where the manifest says {stored.rows}: restore both from a copy."
        )
    return totals


def read_stored(directory: Path, stored: StoredFile) -> bytes:
    """The checked content of one file of a record that nobody is writing to."""
    path = directory / stored.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise missing(path, error) from error
    check_content(path, stored, content)
    return content


def missing(path: Path, error: OSError) -> AuditError:
    """The sentence for a file that the manifest names and that cannot be opened."""
    return AuditError(
        f"{path}, which the manifest names, cannot be read ({error.strerror}): restore it from a copy or delete "
        "the record."
    )


def part_bytes(table: pa.Table) -> bytes:
    """`table` as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def totals_bytes(totals: FeatureTotals) -> bytes:
    """`totals` as a safetensors file."""
    return sealed(totals.state_dict(), {})


def save_totals(path: str | os.PathLike[str], totals: FeatureTotals) -> None:
    """Write totals to a file of their own, say into a trainer's checkpoint, for an exact resume from there."""
    write_durably(Path(path), totals_bytes(totals))
    sync_directory(Path(path).parent)


def load_totals(path: str | os.PathLike[str]) -> FeatureTotals:
    """What `save_totals` wrote.

    Raises:
        AuditError: the file is missing or damaged.
    """
    path = Path(path)
    try:
        return FeatureTotals.from_state(unsealed(path)[0])
    except OSError as error:
        raise AuditError(
            f"the totals in {path} cannot be read ({error.strerror}): check the path."
        ) from error
    except ValueError as error:
        raise AuditError(
            f"{path} is not a readable file of totals ({error}): restore it from a copy."
        ) from error


def temporary(path: Path) -> Path:
    """Where the content of `path` is written before it takes its name."""
    return path.with_name(path.name + ".tmp")


def write_temporary(path: Path, content: bytes) -> Path:
    """Write and sync `content` beside `path`; whoever renames the result to `path` makes it count.

    Where that fails nothing is left: half a file would only take the place that is wanting. What lies there under the temporary
    name, a link that leads elsewhere say, is replaced and not written through.
    """
    try:
        temporary(path).unlink(missing_ok=True)
        with temporary(path).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            temporary(path).unlink(missing_ok=True)
        raise
    return temporary(path)


def checksum(content: bytes) -> int:
    """CRC-32, against accidents, not against tampering."""
    return zlib.crc32(content)


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that at any instant the whole of it is there, or what was there before."""
    write_temporary(path, content).replace(path)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Put files in place that belong together, all of them or none.

    Until all are written the old ones stay; while they change places the last one is absent, so that where it is
    present all are of one writing.
    """
    written: list[Path] = []
    try:
        for path, content in contents.items():
            written.append(write_temporary(path, content))
        list(contents)[-1].unlink(missing_ok=True)
        for path in contents:
            temporary(path).replace(path)
    except OSError:
        for path in written:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Make the names of a directory's files survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
