"""One HTML file that shows what a run taught, or what data would teach: `write_report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    if name not in __all__:  # imported on demand: pandas and scipy take a second
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import page

    return getattr(page, name)
