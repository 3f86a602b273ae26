"""See what a reward really teaches: SAE feature attribution for TRL training runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .audit import Audit, audit_preferences
    from .callback import FeatureAttributionCallback
    from .dictionary import FeatureDictionary
    from .errors import AuditError
    from .filtering import filter_preferences
    from .flags import Flag, FlagSet
    from .record import RunRecord
    from .sae import load_dictionary

__version__ = "0.1.0"

_HOME = {
    "Audit": "audit",
    "AuditError": "errors",
    "FeatureAttributionCallback": "callback",
    "FeatureDictionary": "dictionary",
    "Flag": "flags",
    "FlagSet": "flags",
    "RunRecord": "record",
    "audit_preferences": "audit",
    "filter_preferences": "filtering",
    "load_dictionary": "sae",
}

__all__ = [
    "Audit",
    "AuditError",
    "FeatureAttributionCallback",
    "FeatureDictionary",
    "Flag",
    "FlagSet",
    "RunRecord",
    "__version__",
    "audit_preferences",
    "filter_preferences",
    "load_dictionary",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
