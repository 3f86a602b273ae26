"""What a manifest says of a dictionary, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_place(entry: Mapping[str, Any]) -> str:
    """Where the dictionary of a manifest's entry hooks; of a transcoder also that it is one, and what its scores are about."""
    if not entry.get("reads"):
        return str(entry["hook_point"])
    return f"{entry['hook_point']} (a transcoder: reads {entry['reads']}, writes there; scores are about what this MLP adds)"
