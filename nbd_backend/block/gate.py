"""Drain: the only way in which the graph under a live export is changed.

While it is open no request of these exports is in flight, and new ones wait at their gates: a guest sees
latency, never an error. Gates count, so drains nest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Self

from nbd_backend.block.events import EventRing
from nbd_backend.block.kernel import Event, Export


class Drain:
    """Async context manager: closes the gates of `exports()`, waits until nothing is in flight, reopens them.
    Loop.

    `exports` is asked again after each wait, because an export may be added meanwhile. The gates reopen
    however the body or the wait ends. Keep the body short: guests wait for it.
    """

    def __init__(self, ring: EventRing, exports: Callable[[], Iterable[Export]]) -> None:
        self._ring = ring
        self._exports = exports
        self._closed: list[Export] = []

    async def __aenter__(self) -> Self:
        try:
            while missing := [export for export in self._exports() if export not in self._closed]:
                await asyncio.gather(*map(self._close, missing))
        except BaseException:
            self._reopen()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reopen()

    def _close(self, export: Export) -> asyncio.Future[Event]:
        quiet = self._ring.event(export.close_gate)
        self._closed.append(export)
        return quiet

    def _reopen(self) -> None:
        while self._closed:
            self._closed.pop().open_gate()
