"""Reading a run record back: what the run taught, feature by feature and step by step."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from trl_sae_audit import record_files as files
from trl_sae_audit.errors import AuditError
from trl_sae_audit.record_manifest import Manifest, StoredFile, read_manifest
from trl_sae_audit.totals import FeatureTotals

_ATTEMPTS = 20
"""Manifests to try while a writer keeps replacing them; one read against one flush, so two nearly always do."""


class RunRecord:
    """One run's record, as it was at the moment it was loaded; a run that is still writing does not disturb it.

    Attributes:
        directory: where it was read from.
        manifest: `manifest.json` as a dict.
        status: "running" (or killed), "finished" or "failed".
        last_step: the rows and the totals cover exactly the optimizer steps 1 … last_step.
        dictionaries: one dict a dictionary: name, identity, hook_point, d_sae, d_model …
    """

    def __init__(self, directory: Path, manifest: Manifest, contents: dict[str, bytes]):
        self.directory = directory
        self.manifest: dict[str, Any] = manifest.to_dict()
        self.status = manifest.status
        self.last_step = manifest.last_step
        self.dictionaries: list[dict[str, Any]] = manifest.header["dictionaries"]
        self._stored = manifest
        self._contents = contents

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RunRecord":
        """Read the record in the directory `path`, also while a run is writing to it.

        Raises:
            AuditError: no record, one of an unknown schema version, or one with a missing, truncated or corrupt
                file, which is named.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        for _ in range(_ATTEMPTS):
            try:
                return cls(directory, manifest, _read_all(directory, manifest))
            except AuditError:
                newer = read_manifest(directory)
                if newer.flushes == manifest.flushes:
                    raise
                manifest = newer
        return cls(directory, manifest, _read_all(directory, manifest))

    def table(self, name: str) -> pd.DataFrame:
        """All rows of a table, in the order they were written.

        Raises:
            AuditError: the run wrote no such table, or a part of it cannot be read.
        """
        if name not in self._stored.tables:
            raise AuditError(
                f"the record in {self.directory} has no table {name!r}: it has {sorted(self._stored.tables)}."
            )
        parts = [self._part(stored) for stored in self._stored.tables[name]]
        return pa.concat_tables(parts, promote_options="permissive").to_pandas() if parts else pd.DataFrame()

    @property
    def tables(self) -> list[str]:
        """Names of the tables the run wrote."""
        return sorted(self._stored.tables)

    def steps(self, dictionary: str | None = None) -> pd.DataFrame:
        """Long format, one row a step, dictionary and feature that was watched or in the step's top k.

        Args:
            dictionary: name of the only dictionary to show; all of them otherwise.
        """
        rows = self.table("steps")
        if dictionary is None:
            return rows
        self._described(dictionary)
        return rows[rows["dictionary"] == dictionary].reset_index(drop=True)

    def totals(self, dictionary: str | None = None) -> FeatureTotals:
        """The running totals of a dictionary at `last_step`; its name may be left out if there is one only."""
        name = self._described(dictionary)["name"]
        if name not in self._stored.totals:
            raise AuditError(
                f"the record in {self.directory} has no totals yet, for the run ended or is still before its first "
                "flush: wait for it, or run again."
            )
        stored = self._stored.totals[name]
        return files.parse_totals(self.directory / stored.file, stored, self._contents[stored.file])

    def features(self, dictionary: str | None = None) -> pd.DataFrame:
        """One row a feature, the largest |attribution| over the run first; q-values are within a dictionary.

        Columns: dictionary, feature, label (of a watched feature, else empty), and those of `FeatureTotals.frame`,
        whose notes on the standard errors apply.

        Args:
            dictionary: name of the only dictionary to show; all of them otherwise.
        """
        shown = self.dictionaries if dictionary is None else [self._described(dictionary)]
        frames = [self._features(described) for described in shown]
        table = pd.concat(frames, ignore_index=True)
        order = table["attribution"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)

    def curriculum(self, dictionary: str | None = None) -> pd.DataFrame:
        """Mean attribution per step, time bins × features; the index is each bin's (first_step, last_step).

        Args:
            dictionary: its name; may be left out if there is one only.
        """
        return self.totals(dictionary).curriculum.frame()

    def _features(self, described: dict[str, Any]) -> pd.DataFrame:
        frame = self.totals(described["name"]).frame(described["d_model"])
        labels: dict[int, str] = {}
        for label, feature in self.manifest.get("watch", {}).get(described["name"], {}).items():
            labels[feature] = f"{labels[feature]}, {label}" if feature in labels else label
        frame.insert(0, "dictionary", described["name"])
        frame.insert(2, "label", [labels.get(feature, "") for feature in frame["feature"]])
        return frame

    def _described(self, name: str | None) -> dict[str, Any]:
        names = [entry["name"] for entry in self.dictionaries]
        if name is None and len(names) > 1:
            raise AuditError(f"the record in {self.directory} has several dictionaries: name one of {names}.")
        if name is not None and name not in names:
            raise AuditError(
                f"the record in {self.directory} has no dictionary {name!r}: name one of {names}."
            )
        return self.dictionaries[0 if name is None else names.index(name)]

    def _part(self, stored: StoredFile) -> pa.Table:
        return files.parse_part(self.directory / stored.file, stored, self._contents[stored.file])


def _read_all(directory: Path, manifest: Manifest) -> dict[str, bytes]:
    """The checked content of every file. All are opened before any is read: an open file survives its deletion."""
    with ExitStack() as opened:
        handles = []
        for stored in manifest.files():
            path = directory / stored.file
            if path.exists() and not path.is_file():
                raise AuditError(
                    f"{path}, which the manifest names, is not a file: restore the record from a copy."
                )
            try:
                handles.append((path, stored, opened.enter_context(path.open("rb"))))
            except OSError as error:
                raise files.missing(path, error) from error
        contents = {}
        for path, stored, handle in handles:
            files.check_size(path, stored, os.fstat(handle.fileno()).st_size)
            contents[stored.file] = handle.read()
            files.check_content(path, stored, contents[stored.file])
    return contents
