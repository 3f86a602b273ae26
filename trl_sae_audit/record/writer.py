"""Writing a run record, so that a run killed at any instant leaves a readable one."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from ..attribution.totals import FeatureTotals
from ..errors import AuditError, DirectoryTakenError, RecordWriteError
from ..io import atomic
from ..io.manifest import MANIFEST, StoredFile, check_free, package_versions, plain, write_manifest
from . import files
from .columns import OF_THE_END
from .directory import lock_directory, prepare_directory
from .lock import DirectoryLock
from .manifest import (
    TOTALS,
    Status,
    check_continues,
    check_header,
    files_by_table,
    now,
    read_manifest,
    resumed_header,
)

_WRITTEN_NAME = re.compile(r"\d{6,}(-\d+)?\.(parquet|safetensors)(\.tmp)?")

_FULL_PART = 2**18
"""Rows from which on a part is left as it is, so that no flush reads or writes more than two such parts of a table."""

Part: TypeAlias = StoredFile | pa.Table | FeatureTotals
"""A part of a table, or totals: on disk, or in memory and yet to be written."""


class RecordWriter:
    """Writes one run's record; made by `create` or `resume`. Only a run's main process should have one.

    Every table has a column `step`, the optimizer step the row belongs to. `append` keeps rows in memory, and
    `flush` puts them on disk together with the totals of the same step, or, if it fails, changes nothing.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], lock: DirectoryLock):
        self.directory = directory
        self._manifest = manifest
        self._files = files_by_table(manifest)
        self._lock = lock
        self._attempts: int = manifest["flushes"]
        self._pending: dict[str, list[pa.Table]] = {}
        self._schemas: dict[str, pa.Schema] = {}

    @classmethod
    def create(
        cls, directory: str | os.PathLike[str], header: Mapping[str, Any], *, overwrite: bool = False
    ) -> "RecordWriter":
        """Start the record of a new run in `directory`, which is made if it does not exist.

        Args:
            directory: where; empty, new, or left by a run that ended before its first flush.
            header: what goes into the manifest: trainer, `dictionaries` (each with name, identity, hook_point, d_sae,
                d_model) and `config`, in which `watch` is {dictionary name: {label: feature}}.
            overwrite: replace whatever record there is.

        Raises:
            AuditError: the directory holds another run's record or other files, is in use by another writer, is a
                file or cannot be written; or the header is incomplete.
        """
        checked = check_header(header)
        directory = Path(directory)
        prepare_directory(directory)
        with lock_directory(directory) as lock:
            if (directory / MANIFEST).exists():
                check_free(directory, "run")
                existing = read_manifest(directory)
                if not overwrite and (existing["status"] == "finished" or existing["last_step"]):
                    raise DirectoryTakenError(
                        f"{directory} holds the record of another run: choose another output_dir, delete it, or resume "
                        "that run."
                    )
            begun = {"created": now(), "status": "running", "last_step": 0, "flushes": 0, "extra": {}}
            manifest = {"packages": package_versions(), **checked, **begun}
            writer = cls(directory, manifest, lock)
            writer._commit({}, manifest)
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
        """Continue the record of a run from a checkpoint at `step`; rows of later steps are dropped, and what an end of the run wrote.

        Args:
            directory: the record.
            header: of the resumed run; its dictionaries must be those of the record.
            step: last optimizer step of the checkpoint.
            totals: the totals as they were at `step`. They may be omitted at step 0, and when the record ends at
                `step` itself, for then it has them.

        Raises:
            AuditError: no readable record, one in use by another writer, one of other dictionaries, one that ends
                before `step`, or one that goes beyond `step` without `totals` being given.
        """
        checked = check_header(header)
        directory = Path(directory)
        read_manifest(directory)
        with lock_directory(directory) as lock:
            manifest = read_manifest(directory)
            check_continues(directory, manifest, checked, step)
            if totals is None and step not in (0, manifest["last_step"]):
                raise AuditError(
                    f"The record in {directory} extends to step {manifest['last_step']} and the run resumes at step "
                    f"{step}: pass the totals the checkpoint was saved with."
                )
            writer = cls(directory, manifest, lock)
            parts: dict[str, Sequence[Part]] = {
                name: writer._trim(name, stored, step)
                for name, stored in writer._files.items()
                if name not in (TOTALS, *OF_THE_END)
            }
            kept = writer._files.get(TOTALS, []) if step else []
            parts[TOTALS] = kept if totals is None else _order_totals(totals, manifest)
            own = {name: manifest[name] for name in ("created", "extra")}
            header = resumed_header(manifest, checked, step)
            writer._commit(parts, {**header, **own, "status": "running", "last_step": step})
            writer._delete_unnamed()
        return writer

    @property
    def last_step(self) -> int:
        """Step of the last flush."""
        return self._manifest["last_step"]

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
        if not re.fullmatch(r"[a-z][a-z0-9_]*", table) or table == TOTALS:
            raise AuditError(
                f"{table!r} cannot name a table: use lower-case letters, digits and _, and not 'totals'."
            )
        try:
            rows = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise AuditError(
                f"The rows for table {table!r} do not form a table ({error}): correct them."
            ) from error
        if "step" not in rows.column_names or not pa.types.is_integer(rows.schema.field("step").type):
            raise AuditError(
                f"The rows for table {table!r} lack an integer column 'step': add the optimizer step."
            )
        rows = rows.replace_schema_metadata(None)
        self._remember_schema(table, rows.schema)
        if rows.num_rows:
            self._pending.setdefault(table, []).append(rows)

    def flush(
        self,
        step: int,
        totals: Mapping[str, FeatureTotals],
        extra: Mapping[str, Any] | None = None,
        status: Status = "running",
    ) -> None:
        """Put all rows up to `step`, and the totals at `step`, on disk: all of it or nothing.

        Args:
            step: last optimizer step of the rows and the totals.
            totals: dictionary name → totals, of every dictionary of the header.
            extra: replaces what the manifest holds under `extra` (JSON); None leaves it.
            status: of the run; `close` says that it has ended.

        Raises:
            RecordWriteError: the disk is full or fails, or the directory was removed or damaged: the record stays as
                it was, and the rows wait for the next flush.
            AuditError: rows beyond `step`; a step before the last flush; totals of other dictionaries.
        """
        self._refuse_closed()
        self._lock.check()
        if step < self.last_step:
            raise AuditError(
                f"The record is at step {self.last_step}, beyond step {step}: resume it at {step} first."
            )
        parts: dict[str, Sequence[Part]] = {**self._files, TOTALS: _order_totals(totals, self._manifest)}
        for name, pieces in self._pending.items():
            rows = _join(pieces)
            latest = pc.max(rows["step"]).as_py()
            if latest > step:
                raise AuditError(
                    f"Table {name!r} has rows of step {latest}: flush them at that step, not at {step}."
                )
            parts[name] = self._merge(self._files.get(name, []), rows)
        kept = self._manifest["extra"] if extra is None else plain(extra)
        self._commit(parts, {**self._manifest, "status": status, "last_step": step, "extra": kept})

    def close(
        self,
        status: Status = "finished",
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
        if status not in ("finished", "failed"):
            raise AuditError(f"A record cannot end as {status!r}: close it as 'finished' or 'failed'.")
        try:
            if step is None or totals is None:
                self._lock.check()
                self._commit(self._files, {**self._manifest, "status": status})
            else:
                self.flush(step, totals, status=status)
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """Leave the record as the last flush left it, "running", and let others write."""
        self._pending = {}
        self._lock.release()

    def _merge(self, parts: list[StoredFile], rows: pa.Table) -> list[Part]:
        """`parts` and then `rows`, in which each part is full or has more than twice the rows of the next.

        How often any row is rewritten is then at most log2 of a full part's rows, and so is the number of parts
        that are not full.
        """
        parts = list(parts)
        try:
            while parts and 2 * rows.num_rows >= parts[-1].rows < _FULL_PART:
                rows = _join([self._rows(parts.pop()), rows])
        except AuditError as error:  # its files were changed by someone else
            raise RecordWriteError(f"The run record can no longer be added to: {error}", "damaged") from error
        return [*parts, rows]

    def _rows(self, part: StoredFile) -> pa.Table:
        return files.parse_part(self.directory / part.file, part, part.read(self.directory))

    def _trim(self, name: str, parts: list[StoredFile], step: int) -> list[Part]:
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
                f"The rows for table {table!r} do not fit those before ({error}): keep each column's type."
            ) from error

    def _commit(self, parts: Mapping[str, Sequence[Part]], manifest: Mapping[str, Any]) -> None:
        """Write what is in memory only, then the manifest, and only then delete what it no longer names."""
        self._attempts += 1
        written: list[Path] = [self.directory / MANIFEST]
        try:
            stored = {
                name: [self._store(name, index, part, written) for index, part in enumerate(each)]
                for name, each in parts.items()
            }
            target = {**manifest, "flushes": self._attempts}
            write_manifest(self.directory, "run", target, _all(stored))
        except OSError as error:
            _discard(written)
            raise RecordWriteError(
                f"The run record in {self.directory} could not be written at step {manifest['last_step']} "
                f"({error.strerror}): it is intact up to step {self.last_step}, so make room on the disk or "
                "choose another output_dir.",
                str(error.strerror),
            ) from error
        before, self._files, self._manifest = self._files, stored, target
        self._pending = {}
        with suppress(OSError):  # a file left over does no harm, and `resume` deletes it
            atomic.sync_directory(self.directory)
            for name in _names(before) - _names(stored):
                (self.directory / name).unlink()

    def _store(self, table: str, index: int, part: Part, written: list[Path]) -> StoredFile:
        if isinstance(part, StoredFile):
            return part
        ending, content, rows = files.encode(part)
        stored = StoredFile.of(f"{table}/{self._attempts:06d}-{index}.{ending}", content, rows)
        path = self.directory / stored.file
        path.parent.mkdir(exist_ok=True)
        written.append(path)
        atomic.write_durably(path, content)
        atomic.sync_directory(path.parent)
        return stored

    def _delete_unnamed(self) -> None:
        """Delete what a killed writer left behind: files of ours that the manifest does not name."""
        named = _names(self._files)
        for path in self.directory.glob("*/*"):
            if (
                _WRITTEN_NAME.fullmatch(path.name)
                and path.relative_to(self.directory).as_posix() not in named
            ):
                path.unlink(missing_ok=True)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise AuditError(f"The run record in {self.directory} is closed: resume it to add to it.")


def _order_totals(totals: Mapping[str, FeatureTotals], manifest: Mapping[str, Any]) -> list[FeatureTotals]:
    described = {entry["name"]: entry["d_sae"] for entry in manifest["dictionaries"]}
    sizes = {name: each.n_features for name, each in totals.items()}
    if sizes != described:
        raise AuditError(
            f"The totals are of dictionaries with {sizes} features, but the record's are {described}: pass the totals "
            "of every dictionary of the run."
        )
    return [totals[name] for name in described]


def _join(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive")


def _all(files: Mapping[str, list[StoredFile]]) -> list[StoredFile]:
    return [stored for each in files.values() for stored in each]


def _names(files: Mapping[str, list[StoredFile]]) -> set[str]:
    return {stored.file for stored in _all(files)}


def _discard(written: list[Path]) -> None:
    """Delete the files of a failed flush; of the manifest, which is the previous one still, only the new text."""
    for path in written:
        with suppress(OSError):
            atomic.temporary(path).unlink(missing_ok=True)
            if path.name != MANIFEST:
                path.unlink(missing_ok=True)
