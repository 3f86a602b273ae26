"""Waiting for a coroutine in code that is not async, also where an event loop runs already, as in Jupyter."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def wait_for(value: Any) -> Any:
    """What `value` gives when it is awaited; a value that is not awaitable as it is.

    It is awaited on one event loop in a thread of its own, as TRL's trainers do: a client that an async reward keeps between calls
    stays on its loop, and a loop that runs in the caller's thread is left alone.
    """
    if not inspect.isawaitable(value):
        return value
    loop = _background_loop(os.getpid())
    if asyncio._get_running_loop() is loop:  # called by what runs on it, which must not wait for itself
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, _await(value)).result()
    future = asyncio.run_coroutine_threadsafe(_await(value), loop)
    try:
        return future.result()
    finally:
        future.cancel()  # nothing, unless the caller was interrupted


async def _await(value: Awaitable[Any]) -> Any:
    return await value


@functools.cache
def _background_loop(process: int) -> asyncio.AbstractEventLoop:
    """A loop that runs for as long as the process: a forked one has no threads of its parent."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="trl-sae-audit", daemon=True).start()
    return loop
