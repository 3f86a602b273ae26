"""Methods of single objects, wrapped for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

Method: TypeAlias = Callable[..., Any]
_PACKAGE = str(Path(__file__).parent.parent)


class _Wrapper:
    """Takes the place of one of an object's methods; passes calls through once it is no longer active."""

    def __init__(self, owner: Any, name: str, replacement: Method) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        self.in_instance = name in vars(owner)
        self.active = True
        self._replacement = replacement
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if self.active:
                return self._replacement(self.original, *args, **kwargs)
            return self.original(*args, **kwargs)
        except BaseException as error:
            # A bare `raise` adds no entry for this frame again, so the entries removed here stay removed.
            error.__traceback__ = _without_own_frames(error.__traceback__)
            raise


class MethodWraps:
    """Replaces methods of single objects, and puts them back.

    Several may wrap the same method and end in any order: one that ends below another passes calls through until
    that one ends as well.
    """

    def __init__(self) -> None:
        self._wrappers: list[_Wrapper] = []

    def wrap(self, owner: Any, name: str, replacement: Method) -> None:
        """Let `replacement(original, *args, **kwargs)` answer calls of the method."""
        wrapper = _Wrapper(owner, name, replacement)
        setattr(owner, name, wrapper)
        self._wrappers.append(wrapper)

    def undo(self) -> None:
        """Put the methods back."""
        while self._wrappers:
            ended = self._wrappers.pop()
            ended.active = False
            top = vars(ended.owner).get(ended.name)
            while isinstance(top, _Wrapper) and not top.active:
                if top.in_instance:
                    setattr(top.owner, top.name, top.original)
                else:
                    delattr(top.owner, top.name)
                top = vars(ended.owner).get(ended.name)


def _without_own_frames(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without its first entries that are of this package, if the exception was raised by the method they call.

    What this package itself raises, or a function that it calls for its own purposes, keeps its whole traceback.
    """
    entry = traceback
    while entry is not None and _passes_through(entry):
        entry = entry.tb_next
    if entry is None or entry.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        return traceback
    return entry


def _passes_through(entry: TracebackType) -> bool:
    """Whether a frame is one that has a method of somebody else as its argument `original`, or calls such a frame."""
    frame = entry.tb_frame
    return frame.f_code.co_filename.startswith(_PACKAGE) and (
        frame.f_code is _Wrapper.__call__.__code__ or "original" in frame.f_code.co_varnames
    )
