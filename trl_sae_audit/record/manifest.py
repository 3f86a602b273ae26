"""What the manifest of a run record says: the only thing that tells which files belong to the record.

A record is a directory with tables cut into Parquet parts (`steps/000007-0.parquet`) and one safetensors file of totals
a dictionary (`totals/000007-0.safetensors`, in the order of the dictionaries). A file that a manifest named is never changed
and its name is not used again: a flush writes new files, then replaces the manifest, then deletes the old ones. Hence,
whatever instant a process dies at, the manifest on disk names a complete, matching set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from ..errors import AuditError
from ..io import manifest
from ..io.manifest import StoredFile
from ..saes.info import DictionaryInfo

TOTALS = "totals"
_OWN_KEYS = {"kind", "format", "created", "status", "last_step", "flushes", "files", "extra"}

Status = Literal["running", "finished", "failed"]


@dataclass(frozen=True)
class RunConfig:
    """The options of a run that a record's reader depends on."""

    watch: dict[str, dict[str, NonNegativeInt]] = field(default_factory=dict)
    """Dictionary → label → feature."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a run says about itself, at least."""

    dictionaries: Annotated[list[DictionaryInfo], Field(min_length=1)]
    config: RunConfig = field(default_factory=RunConfig)
    sides: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        d_sae = {each.name: each.d_sae for each in self.dictionaries}
        if len(d_sae) < len(self.dictionaries):
            raise ValueError("two dictionaries have the same name")
        for name, labels in self.config.watch.items():
            if name not in d_sae or not all(feature < d_sae[name] for feature in labels.values()):
                raise ValueError(f"{labels} are watched in {name!r}, and there are {d_sae}")


@dataclass(frozen=True, kw_only=True)
class _Content(Header):
    """A manifest: the header, and where the record stands.

    Attributes:
        last_step: rows and totals on disk cover exactly the steps up to this one.
        flushes: times the record was written; numbers the files.
    """

    created: str
    status: Status
    last_step: NonNegativeInt
    flushes: NonNegativeInt
    files: list[StoredFile] = field(default_factory=list)
    extra: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        totals = [stored.rows for stored in self.files if stored.file.startswith(f"{TOTALS}/")]
        if totals and totals != [each.d_sae for each in self.dictionaries]:
            raise ValueError(f"its totals have {totals} features, which are not those of its dictionaries")


def now() -> str:
    """This moment, UTC, ISO 8601, to the millisecond: two runs of a small model begin in the same second."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def check_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as the manifest will hold it.

    Raises:
        AuditError: it lacks something, contradicts itself, or has a key that is the manifest's own.
    """
    checked = manifest.plain(header)
    clash = sorted(set(checked) & _OWN_KEYS)
    if clash:
        raise AuditError(f"The run's header uses {clash}, which the record writes itself; rename them.")
    try:
        manifest.fit(Header, checked)
    except ValueError as error:
        raise AuditError(f"The run's header is wrong ({error}); correct it.") from error
    return checked


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the record in `directory`.

    Raises:
        AuditError: no record there, an unknown format, a damaged manifest, or one that names a file outside the directory.
    """
    return manifest.read_manifest(directory, "run", shape=_Content)


def files_by_table(content: Mapping[str, Any]) -> dict[str, list[StoredFile]]:
    """The files that a manifest names, by their table; those of `TOTALS` are in the order of the dictionaries."""
    tables: dict[str, list[StoredFile]] = {}
    for stored in manifest.stored_files(content):
        tables.setdefault(stored.file.partition("/")[0], []).append(stored)
    return tables


def check_continues(
    directory: Path, recorded: Mapping[str, Any], header: Mapping[str, Any], step: int
) -> None:
    """Refuse, with an AuditError, to continue a record with other dictionaries, or beyond a gap in the steps."""
    before, after = recorded["dictionaries"], header["dictionaries"]
    different = [] if len(before) == len(after) else [f"{len(before)} then, {len(after)} now"]
    different += [
        f"{key} {then[key]!r} then, {now[key]!r} now"
        for then, now in zip(before, after, strict=False)
        for key in ("name", "identity", "hook_point", "d_sae", "d_model")
        if then[key] != now[key]
    ]
    if different:
        raise AuditError(
            f"The record in {directory} was made with other dictionaries ({'; '.join(different)}); use the same ones, or "
            "choose another output_dir."
        )
    if recorded["last_step"] < step:
        raise AuditError(
            f"The record in {directory} ends at step {recorded['last_step']}, before step {step} where the run resumes; "
            "resume from an earlier checkpoint, or choose another output_dir."
        )


def is_same_run(recorded: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    """Whether a record belongs to a run with the same options, whatever checkpoint it was resumed from."""
    return _asked_for(recorded) == _asked_for(manifest.plain(header))


def _asked_for(header: Mapping[str, Any]) -> list[Any]:
    config = header.get("config", {})
    arguments = {**config.get("arguments", {}), "resume_from_checkpoint": None}
    return [header.get("model"), header["dictionaries"], {**config, "arguments": arguments}]


def resumed_header(recorded: Mapping[str, Any], header: dict[str, Any], step: int) -> dict[str, Any]:
    """The header of the resumed run, with a note of when it resumed and with which packages."""
    note = {"step": step, "time": now(), "packages": manifest.package_versions()}
    resumed = [*recorded.get("resumed", []), note]
    return {"packages": recorded["packages"], **header, "resumed": resumed}
