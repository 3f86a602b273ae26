"""What the files of an audit must look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from .content import audit_key
from .gradients import PROMPT_TAIL, ExampleArrays
from .prompt_states import state_size

_ARRAYS = tuple(field.name for field in fields(ExampleArrays))


def check_part(
    arrays: Mapping[str, np.ndarray], described: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Refuse, with a ValueError, KeyError or TypeError, what is no part of the audit of that manifest."""
    lacking = [name for name in (*_ARRAYS, "row", "digest") if name not in arrays]
    if lacking:
        raise ValueError(f"it has no {lacking[0]!r}")
    if described.get("audit") != audit_key(manifest):
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
        "weight": ("float32", arrays["side"].shape),
        "residual": ("float32", arrays["gradient"].shape),
        "indptr": ("int64", (answers + 1,)),
        "feature": ("int32", active),
        **dict.fromkeys(
            ("mean", "max_activation", "activation_attribution", "selected"), ("float32", active)
        ),
        **dict.fromkeys(("peak", "active_tokens"), ("int32", active)),
        "token_indptr": ("int64", (answers + 1,)),
        "token": ("int32", arrays["token"].shape[:1]),
        "prompt_tail": ("int32", (*arrays["side"].shape, PROMPT_TAIL)),
        "prompt_state": ("float32", (n, state_size(d_model))),
    }
    for name, (kind, shape) in shapes.items():
        if arrays[name].dtype != kind or arrays[name].shape != shape:
            raise ValueError(
                f"{name!r} is {arrays[name].dtype} {arrays[name].shape} instead of {kind} {shape}"
            )
    within = (arrays["row"] >= 0).all() and (rows is None or (arrays["row"] < rows).all())
    if not within or (np.diff(arrays["row"]) <= 0).any() or n > len(arrays["digest"]):
        raise ValueError("its rows are not rows of the data, in order")
    for name, cut, what in (("feature", "indptr", "active features"), ("token", "token_indptr", "tokens")):
        places = arrays[cut]
        if places[0] != 0 or places[-1] != len(arrays[name]) or (np.diff(places) < 0).any():
            raise ValueError(f"its {what} are not cut into answers")
    room = np.repeat(np.diff(arrays["token_indptr"]), np.diff(arrays["indptr"]))
    if ((arrays["peak"] < 0) | (arrays["peak"] >= np.maximum(room, 1))).any():
        raise ValueError("a feature is most active beyond its answer")
    if active[0] and not (arrays["feature"].min() >= 0 and arrays["feature"].max() < d_sae):
        raise ValueError(f"it has features beyond the dictionary's {d_sae}")
    if not np.isin(arrays["side"], (-1, 0, 1)).all():
        raise ValueError("an answer is on no side")
