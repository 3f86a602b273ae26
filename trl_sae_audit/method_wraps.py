"""Methods of single objects, wrapped for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class _Wrapper:
    """Stands in an object for one of its methods; hands through to it once it is no longer active."""

    def __init__(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        self.in_instance = name in vars(owner)
        self.active = True
        self._replacement = make(self.original)
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._replacement if self.active else self.original)(*args, **kwargs)


class MethodWraps:
    """Replaces methods of single objects, and puts them back.

    Several may wrap the same method and end in any order: one that ends below another hands through until
    that one ends as well.
    """

    def __init__(self) -> None:
        self._wrappers: list[_Wrapper] = []

    def wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        wrapper = _Wrapper(owner, name, make)
        setattr(owner, name, wrapper)
        self._wrappers.append(wrapper)

    def undo(self) -> None:
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
