"""What files say of a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeAlias

from pydantic import Field

Size: TypeAlias = Annotated[int, Field(gt=0, lt=2**53)]


@dataclass(frozen=True)
class DictionaryInfo:
    """What a run record or an audit keeps of a dictionary.

    `reads` is where a transcoder's encoder reads, which writes at `hook_point`; None for all others.
    """

    name: str
    identity: str
    hook_point: str
    d_sae: Size
    d_model: Size
    model_name: str | None = None
    neuronpedia_id: str | None = None
    reads: str | None = None


def describe(entry: Mapping[str, Any]) -> DictionaryInfo:
    """The dictionary that an entry of a manifest describes; what else it has is left out."""
    known = {each.name for each in fields(DictionaryInfo)}
    return DictionaryInfo(**{name: value for name, value in entry.items() if name in known})
