"""What the files of an audit must look like."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from .audit_pass import ExampleArrays
from .errors import AuditError
from .untrusted_tables import unsealed

_OF_THE_RUN = (
    "schema", "status", "versions", "parts", "processes", "rows", "examples", "dataset_sha256", "set_aside", "notes"
)  # fmt: skip
"""What a manifest says besides the header, and the versions, which may change between two starts."""
_MOST = 2**53
_ARRAYS = tuple(field.name for field in fields(ExampleArrays))


def unsealed_part(
    path: Path, names: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `sealed` wrote: arrays and description; see `unsealed`.

    Raises:
        AuditError: missing or damaged.
    """
    try:
        return unsealed(path, names)
    except (ValueError, OSError) as error:
        raise AuditError(
            f"{path} of the audit cannot be read ({error}); restore it from a copy, or delete it and audit again with "
            "the same output_dir."
        ) from error


def audit_key(manifest: Mapping[str, Any]) -> int:
    """A number for what was audited with what; a part of another audit has another."""
    header = {name: value for name, value in manifest.items() if name not in _OF_THE_RUN}
    return zlib.crc32(json.dumps(header, sort_keys=True, default=str).encode())


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse, with a ValueError, a manifest that no audit could have written."""
    if manifest.get("status") not in ("running", "finished"):
        raise ValueError(f"its status is {manifest.get('status')!r}")
    dictionary = _part(manifest, "dictionary", dict)
    for name in ("name", "identity", "hook_point"):
        _part(dictionary, name, str)
    for name in ("model_name", "neuronpedia_id"):
        if dictionary.get(name) is not None:
            _part(dictionary, name, str)
    for name in ("d_sae", "d_model"):
        _count(dictionary, name, least=1)
    loss = _part(manifest, "loss", dict)
    _part(loss, "objective", str)
    sides = _part(loss, "sides", list)
    if not 1 <= len(sides) <= 2 or not all(isinstance(side, str) for side in sides):
        raise ValueError(f"its sides are {sides!r}")
    settings = _part(manifest, "settings", dict)
    _part(settings, "activations", bool)
    _count(settings, "seed")
    if manifest["status"] == "finished":
        _check_figures(manifest)


def _check_figures(manifest: Mapping[str, Any]) -> None:
    for name in ("parts", "rows", "examples"):
        _count(manifest, name)
    _part(manifest, "dataset_sha256", str)
    for name in _part(manifest, "notes", dict):
        _count(manifest["notes"], name)
    aside = _part(manifest, "set_aside", list)
    for entry in aside:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            raise ValueError(f"a row it set aside is {entry!r}")
        _count({"row": entry[0]}, "row", most=manifest["rows"] - 1)
    if manifest["examples"] + len(aside) > manifest["rows"]:
        raise ValueError(f"it has {manifest['examples']} examples in {manifest['rows']} rows")


def _part(mapping: Mapping[str, Any], name: str, kind: type) -> Any:
    value = mapping.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"its {name!r} is {value!r}")
    return value


def _count(mapping: Mapping[str, Any], name: str, least: int = 0, most: int = _MOST) -> None:
    value = mapping.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"its {name!r} is {value!r}")


def check_part(
    arrays: Mapping[str, np.ndarray], described: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Refuse, with a ValueError, KeyError or TypeError, what is no part of the audit of that manifest."""
    lacking = [name for name in (*_ARRAYS, "row", "digest") if name not in arrays]
    if lacking:
        raise ValueError(f"it has no {lacking[0]!r}")
    if described.get("audit") not in (None, audit_key(manifest)):
        raise ValueError("it belongs to another audit")
    notes, aside = described["notes"], described["set_aside"]
    if not (isinstance(notes, dict) and all(isinstance(count, int) for count in notes.values())):
        raise ValueError(f"its notes are {notes!r}")
    if not all(isinstance(row, int) and isinstance(reason, str) for row, reason in aside):
        raise ValueError(f"the rows it set aside are {aside!r}")
    dictionary = manifest["dictionary"]
    _check_arrays(arrays, dictionary["d_sae"], dictionary["d_model"], manifest.get("rows"))


def _check_arrays(arrays: Mapping[str, np.ndarray], d_sae: int, d_model: int, rows: int | None) -> None:
    n, answers = len(arrays["row"]), arrays["side"].size
    per_example = answers // n if n else 0
    active = arrays["feature"].shape[:1]
    shapes = {
        "row": ("int64", (n,)),
        "digest": ("uint8", (len(arrays["digest"]), 32)),
        "gradient": ("float32", (n, per_example or arrays["gradient"].shape[1], d_model)),
        "side": ("int8", (n, per_example or arrays["side"].shape[1])),
        "length": ("int32", arrays["side"].shape),
        "log_prob": ("float32", arrays["side"].shape),
        "indptr": ("int64", (answers + 1,)),
        "feature": ("int32", active),
        **dict.fromkeys(("mean", "extreme", "effect"), ("float32", active)),
    }
    for name, (kind, shape) in shapes.items():
        if arrays[name].dtype != kind or arrays[name].shape != shape:
            raise ValueError(
                f"{name!r} is {arrays[name].dtype} {arrays[name].shape} instead of {kind} {shape}"
            )
    within = (arrays["row"] >= 0).all() and (rows is None or (arrays["row"] < rows).all())
    if not within or (np.diff(arrays["row"]) <= 0).any() or n > len(arrays["digest"]):
        raise ValueError("its rows are not rows of the data, in order")
    places = arrays["indptr"]
    if places[0] != 0 or places[-1] != active[0] or (np.diff(places) < 0).any():
        raise ValueError("its active features are not cut into answers")
    if active[0] and not (arrays["feature"].min() >= 0 and arrays["feature"].max() < d_sae):
        raise ValueError(f"it has features beyond the dictionary's {d_sae}")
    if not np.isin(arrays["side"], (-1, 0, 1)).all():
        raise ValueError("an answer is on no side")
