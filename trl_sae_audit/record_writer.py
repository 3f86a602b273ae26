"""Writing a run record, so that a run killed at any instant leaves a readable one."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from trl_sae_audit import record_files as files
from trl_sae_audit.directory_lock import LOCK, DirectoryLock, unusable
from trl_sae_audit.errors import AuditError, RecordWriteError
from trl_sae_audit.record_manifest import (
    MANIFEST,
    STATUSES,
    Manifest,
    StoredFile,
    check_continues,
    check_header,
    now,
    package_versions,
    plain,
    read_manifest,
    resumed_header,
)
from trl_sae_audit.totals import FeatureTotals

_WRITTEN_NAME = re.compile(r"\d{6,}(-\d+)?\.(parquet|safetensors)(\.tmp)?")

_FULL_PART = 2**18
"""Rows from which on a part is left as it is, so that no flush reads or writes more than two such parts of a table."""

Part: TypeAlias = StoredFile | pa.Table
"""A part of a table: on disk, or in memory and yet to be written."""


class RecordWriter:
    """Writes one run's record; made by `create` or `resume`. Only a run's main process should have one.

    Every table has a column `step`, the optimizer step the row belongs to. `append` keeps rows in memory, and
    `flush` puts them on disk together with the totals of the same step, or, if it fails, changes nothing.
    """

    def __init__(self, directory: Path, manifest: Manifest, lock: DirectoryLock):
        self.directory = directory
        self._manifest = manifest
        self._lock = lock
        self._attempts = manifest.flushes
        self._pending: dict[str, list[pa.Table]] = {}
        self._schemas: dict[str, pa.Schema] = {}

    @classmethod
    def create(
        cls, directory: str | os.PathLike[str], header: Mapping[str, Any], *, anew: bool = False
    ) -> "RecordWriter":
        """Start the record of a new run in `directory`, which is made if it does not exist.

        Args:
            directory: where; empty, new, or left by a run that ended before its first flush.
            header: what goes into the manifest: trainer, model, arguments, `dictionaries` (each with name,
                identity, hook_point, d_sae, d_model) and `watch` ({dictionary name: {label: feature}}).
            anew: begin in place of whatever record there is.

        Raises:
            AuditError: the directory holds another run's record or other files, is in use by another writer, is a
                file or cannot be written; or the header is incomplete.
        """
        checked = check_header(header)
        directory = Path(directory)
        _prepare(directory)
        with _locked(directory) as lock:
            if (directory / MANIFEST).exists() and not (anew or _never_began(directory)):
                raise AuditError(
                    f"{directory} holds the record of another run: choose another output_dir, delete it, or resume "
                    "that run."
                )
            manifest = Manifest(header={"versions": package_versions(), **checked}, created=now())
            writer = cls(directory, manifest, lock)
            writer._commit({}, None, manifest)
            writer._delete_unnamed()
        return writer

    @classmethod
    def resume(
        cls,
        directory: str | os.PathLike[str],
        header: Mapping[str, Any],
        step: int,
        totals: Mapping[str, FeatureTotals] | None = None,
    ) -> "RecordWriter":
        """Continue the record of a run from a checkpoint at `step`; rows of later steps are dropped.

        Args:
            directory: the record.
            header: of the run that goes on; its dictionaries must be those of the record.
            step: last optimizer step of the checkpoint.
            totals: the totals as they were at `step`. They may be left out at step 0, and when the record ends at
                `step` itself, for then it has them.

        Raises:
            AuditError: no readable record, one in use by another writer, one of other dictionaries, one that ends
                before `step`, or one that goes beyond `step` without `totals` being given.
        """
        checked = check_header(header)
        directory = Path(directory)
        read_manifest(directory)
        with _locked(directory) as lock:
            manifest = read_manifest(directory)
            check_continues(directory, manifest, checked, step)
            if totals is not None:
                _check_totals(totals, manifest)
            elif step not in (0, manifest.last_step):
                raise AuditError(
                    f"the record in {directory} goes on to step {manifest.last_step} and the run resumes at step "
                    f"{step}: pass the totals the checkpoint was saved with."
                )
            writer = cls(directory, manifest, lock)
            tables = {name: writer._trimmed(name, parts, step) for name, parts in manifest.tables.items()}
            target = replace(
                manifest, header=resumed_header(manifest, checked, step), status="running", last_step=step
            )
            if totals is None and step == 0:
                target = replace(target, totals={})
            writer._commit({name: parts for name, parts in tables.items() if parts}, totals, target)
            writer._delete_unnamed()
        return writer

    @property
    def last_step(self) -> int:
        """Step of the last flush."""
        return self._manifest.last_step

    @property
    def extra(self) -> dict[str, Any]:
        """What the last flush stored under `extra`."""
        return self._manifest.extra

    @property
    def waiting_bytes(self) -> int:
        """Memory taken by the rows that wait for the next flush."""
        return sum(rows.nbytes for pieces in self._pending.values() for rows in pieces)

    @property
    def closed(self) -> bool:
        """Whether the record was ended (or belongs to the process this one was forked from)."""
        return not self._lock.held

    def append(self, table: str, columns: Mapping[str, Any] | pa.Table) -> None:
        """Add rows to a table, in memory until the next flush.

        Args:
            table: "steps", "examples", "health" …; a new name begins a new table.
            columns: name → values, or an Arrow table; `step` is one of them.

        Raises:
            AuditError: no `step`, columns of unequal length, or a column whose type changed.
        """
        self._refuse_closed()
        if not re.fullmatch(r"[a-z][a-z0-9_]*", table) or table == "totals":
            raise AuditError(
                f"{table!r} cannot name a table: use lower-case letters, digits and _, and not 'totals'."
            )
        try:
            rows = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise AuditError(
                f"the rows for table {table!r} do not form a table ({error}): correct them."
            ) from error
        if "step" not in rows.column_names or not pa.types.is_integer(rows.schema.field("step").type):
            raise AuditError(
                f"the rows for table {table!r} lack an integer column 'step': add the optimizer step."
            )
        rows = rows.replace_schema_metadata(None)
        self._remember_schema(table, rows.schema)
        if rows.num_rows:
            self._pending.setdefault(table, []).append(rows)

    def flush(
        self, step: int, totals: Mapping[str, FeatureTotals], extra: Mapping[str, Any] | None = None
    ) -> None:
        """Put all rows up to `step`, and the totals at `step`, on disk: all of it or nothing.

        Args:
            step: last optimizer step of the rows and the totals.
            totals: dictionary name → totals, of every dictionary of the header.
            extra: replaces what the manifest holds under `extra` (JSON); None leaves it.

        Raises:
            RecordWriteError: the disk is full or fails, or the directory was removed or damaged: the record stays as
                it was, and the rows wait for the next flush.
            AuditError: rows beyond `step`; a step before the last flush; totals of other dictionaries.
        """
        self._refuse_closed()
        self._lock.check()
        self._flush(step, totals, extra, "running")

    def close(
        self,
        status: str = "finished",
        step: int | None = None,
        totals: Mapping[str, FeatureTotals] | None = None,
    ) -> None:
        """End the record with `status` "finished" or "failed", and let others write; harmless when repeated.

        With `step` and `totals` a last flush is made. Without, the record ends with the last flush, and rows
        appended since are not in it, as if the run had been killed.

        Raises:
            AuditError: as `flush`; the directory is given free all the same.
        """
        if self.closed:
            return
        if status not in STATUSES[1:]:
            raise AuditError(f"a record cannot end as {status!r}: close it as 'finished' or 'failed'.")
        try:
            self._lock.check()
            if step is None or totals is None:
                self._commit(self._manifest.tables, None, replace(self._manifest, status=status))
            else:
                self._flush(step, totals, None, status)
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """Leave the record as the last flush left it, "running", and let others write."""
        self._pending = {}
        self._lock.release()

    def _flush(
        self, step: int, totals: Mapping[str, FeatureTotals], extra: Mapping[str, Any] | None, status: str
    ) -> None:
        if step < self.last_step:
            raise AuditError(
                f"the record is at step {self.last_step}, beyond step {step}: resume it at {step} first."
            )
        _check_totals(totals, self._manifest)
        tables: dict[str, list[Part]] = {name: list(parts) for name, parts in self._manifest.tables.items()}
        for name, pieces in self._pending.items():
            rows = _joined(pieces)
            latest = pc.max(rows["step"]).as_py()
            if latest > step:
                raise AuditError(
                    f"table {name!r} has rows of step {latest}: flush them at that step, not at {step}."
                )
            tables[name] = self._merged(tables.get(name, []), rows)
        target = replace(self._manifest, status=status, last_step=step)
        if extra is not None:
            target = replace(target, extra=plain(extra))
        self._commit(tables, totals, target)

    def _merged(self, parts: list[Part], rows: pa.Table) -> list[Part]:
        """`parts` and then `rows`, in which each part is full or has more than twice the rows of the next.

        How often any row is rewritten is then at most log2 of a full part's rows, and so is the number of parts
        that are not full.
        """
        parts = list(parts)
        try:
            while parts and 2 * rows.num_rows >= _n_rows(parts[-1]) < _FULL_PART:
                rows = _joined([self._rows(parts.pop()), rows])
        except AuditError as error:  # its files were changed by someone else
            raise RecordWriteError(f"the run record can no longer be added to: {error}", "damaged") from error
        return [*parts, rows]

    def _rows(self, part: Part) -> pa.Table:
        if isinstance(part, pa.Table):
            return part
        return files.parse_part(self.directory / part.file, part, files.read_stored(self.directory, part))

    def _trimmed(self, name: str, parts: list[StoredFile], step: int) -> list[Part]:
        """`parts` without the rows of steps after `step`; a part that loses none stays as it is on disk."""
        kept: list[Part] = []
        for part in parts:
            rows = self._rows(part)
            self._remember_schema(name, rows.schema)
            early = rows.filter(pc.less_equal(rows["step"], step))
            if early.num_rows:
                kept.append(part if early.num_rows == rows.num_rows else early)
        return kept

    def _remember_schema(self, table: str, schema: pa.Schema) -> None:
        try:
            known = self._schemas.get(table, schema)
            self._schemas[table] = pa.unify_schemas([known, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise AuditError(
                f"the rows for table {table!r} do not fit those before ({error}): keep each column's type."
            ) from error

    def _commit(
        self, tables: Mapping[str, list[Part]], totals: Mapping[str, FeatureTotals] | None, target: Manifest
    ) -> None:
        """Write what is in memory only, then the manifest, and only then delete what it no longer names.

        `totals` None keeps the files of totals that `target` names.
        """
        previous = self._manifest
        self._attempts += 1
        written: list[Path] = [self.directory / MANIFEST]
        try:
            parts = {name: self._write_parts(name, table, written) for name, table in tables.items()}
            stored = target.totals if totals is None else self._write_totals(totals, written)
            target = replace(target, flushes=self._attempts, tables=parts, totals=stored)
            files.write_durably(self.directory / MANIFEST, target.to_json())
        except OSError as error:
            _discard(written)
            raise RecordWriteError(
                f"the run record in {self.directory} could not be written at step {target.last_step} "
                f"({error.strerror}): it is intact up to step {previous.last_step}, so make room on the disk or "
                "choose another output_dir.",
                str(error.strerror),
            ) from error
        self._manifest = target
        self._pending = {}
        with suppress(OSError):  # a file left over does no harm, and `resume` deletes it
            files.sync_directory(self.directory)
            for name in {stored.file for stored in previous.files()} - {
                stored.file for stored in target.files()
            }:
                (self.directory / name).unlink()

    def _write_parts(self, name: str, parts: list[Part], written: list[Path]) -> list[StoredFile]:
        stored = []
        for index, part in enumerate(parts):
            if isinstance(part, pa.Table):
                file = f"{name}/{self._attempts:06d}-{index}.parquet"
                part = self._write(file, files.part_bytes(part), part.num_rows, written)
            stored.append(part)
        return stored

    def _write_totals(
        self, totals: Mapping[str, FeatureTotals], written: list[Path]
    ) -> dict[str, StoredFile]:
        stored = {}
        for index, (name, each) in enumerate(totals.items()):
            file = f"totals/{self._attempts:06d}-{index}.safetensors"
            stored[name] = self._write(file, files.totals_bytes(each), each.n_features, written)
        return stored

    def _write(self, file: str, content: bytes, rows: int, written: list[Path]) -> StoredFile:
        path = self.directory / file
        path.parent.mkdir(exist_ok=True)
        written.append(path)
        files.write_durably(path, content)
        files.sync_directory(path.parent)
        return StoredFile(file=file, bytes=len(content), crc32=files.checksum(content), rows=rows)

    def _delete_unnamed(self) -> None:
        """Delete what a killed writer left behind: files of ours that the manifest does not name."""
        named = {stored.file for stored in self._manifest.files()}
        for path in self.directory.glob("*/*"):
            if (
                _WRITTEN_NAME.fullmatch(path.name)
                and path.relative_to(self.directory).as_posix() not in named
            ):
                path.unlink(missing_ok=True)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise AuditError(f"the run record in {self.directory} is closed: resume it to add to it.")


@contextmanager
def _locked(directory: Path) -> Iterator[DirectoryLock]:
    """A lock that outlives the block only if the block succeeds."""
    lock = DirectoryLock(directory)
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


def _prepare(directory: Path) -> None:
    """Make the directory, or refuse one that is neither empty nor a record.

    A creation that was killed before its manifest leaves at most a lock and a temporary manifest.
    """
    if directory.exists() and not directory.is_dir():
        raise AuditError(
            f"{directory} is a file, but a run record is a directory: choose another output_dir."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise unusable(directory, error) from error
    foreign = sorted(present - {LOCK, files.temporary(Path(MANIFEST)).name})
    if foreign and MANIFEST not in present:
        raise AuditError(
            f"{directory} is not empty and holds no run record (it has {foreign[0]!r}): choose a new or empty "
            f"output_dir, for example {directory / 'audit'}."
        )


def _check_totals(totals: Mapping[str, FeatureTotals], manifest: Manifest) -> None:
    described = {entry["name"]: entry["d_sae"] for entry in manifest.header["dictionaries"]}
    found = {name: each.n_features for name, each in totals.items()}
    if found != described:
        raise AuditError(
            f"the totals are of dictionaries with {found} features, but the record's are {described}: pass the totals "
            "of every dictionary of the run."
        )


def _joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive")


def _n_rows(part: Part) -> int:
    return part.num_rows if isinstance(part, pa.Table) else part.rows


def _discard(written: list[Path]) -> None:
    """Delete the files of a failed flush; of the manifest, which is the previous one still, only the new text."""
    for path in written:
        with suppress(OSError):
            files.temporary(path).unlink(missing_ok=True)
            if path.name != MANIFEST:
                path.unlink(missing_ok=True)


def _never_began(directory: Path) -> bool:
    """Whether the record is of a run that failed or died before its first flush, and so holds nothing."""
    manifest = read_manifest(directory)
    return manifest.status != "finished" and manifest.last_step == 0
