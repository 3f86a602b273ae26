"""Where things that can be made or fetched again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$TRL_SAE_AUDIT_CACHE` if set, else `trl-sae-audit` under `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("TRL_SAE_AUDIT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "trl-sae-audit"
