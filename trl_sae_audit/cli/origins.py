"""What an artefact says of where it came from: the options that commands about it need not be given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..io.manifest import MANIFEST, read_manifest

ROWS_OF_A_RUN = 200
"""Rows that are read of the data that a run trained on, where no others are named."""
_OF_AN_AUDIT = ("model", "dictionary", "sae_id", "hook_point", "transcoder", "dataset", "split", "max_rows")


_BELONGS = {"dataset": ("split", "max_rows"), "dictionary": ("sae_id", "hook_point", "transcoder")}


def known_options(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known where some options were given: who names other data or another dictionary says all of it.

    Args:
        source: the name of the option that names the run or the audit.
        given: options by name.
    """
    found = origins(given.get(source))
    replaced = {part for name, parts in _BELONGS.items() if name in given for part in parts}
    return {name: value for name, value in found.items() if name not in replaced}


def origins(directory: str | Path | None) -> dict[str, Any]:
    """Options of the run or the audit in a directory: model, dataset, dictionary, and of a run the model `after` it.

    Those that it does not know are not there; none at all where there is no such directory.

    Raises:
        AuditError: a damaged manifest, or one of something else.
    """
    if directory is None or not (Path(directory) / MANIFEST).is_file():
        return {}
    manifest = read_manifest(directory, "run", "audit")
    config: Mapping[str, Any] = manifest.get("config") or {}
    if manifest["kind"] == "audit":
        return {name: config[name] for name in _OF_AN_AUDIT if config.get(name) not in (None, False)}
    known: Mapping[str, Any] = config.get("origins") or {}
    found = {name: known[name] for name in ("model", "after", "dataset") if known.get(name)}
    if "dataset" in found:
        found["max_rows"] = ROWS_OF_A_RUN
    dictionaries = manifest["dictionaries"]
    return found | (known.get("dictionaries") or {}).get(dictionaries[0]["name"], {})
