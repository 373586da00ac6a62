"""The kernel's event ring as asyncio sees it: work submitted under a token becomes an awaitable, what comes
unasked becomes a callback. Everything here belongs to the thread of the event loop.

A token that is awaited is forgotten when its event has come or its awaiter is gone, whichever is first; an
event that nobody knows is dropped, because that is what a cancelled awaiter leaves behind.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Protocol, Self

from nbd_backend.block import kernel
from nbd_backend.block.errors import KernelError
from nbd_backend.block.kernel import Event, EventKind

log = logging.getLogger(__name__)

Callback = Callable[[Event], None]

# Of the process, like the ring: the event of an earlier loop's work must not meet a token of this one's.
_tokens = itertools.count(1)


class Source(Protocol):
    """Where events come from; the kernel, or a stand-in in tests."""

    def ring_fd(self) -> int: ...
    def ring_read(self) -> list[Event]: ...


class EventRing:
    """Delivers the kernel's events on one loop; made on that loop's thread, one per process."""

    def __init__(self, source: Source = kernel) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._waiting: dict[int, asyncio.Future[Event]] = {}
        self._subscribers: dict[int, Callback] = {}
        self._by_kind: dict[EventKind, Callback] = {}
        self._loop.add_reader(source.ring_fd(), self._deliver)

    def close(self) -> None:
        """Stop reading; whoever still waits is cancelled."""
        self._loop.remove_reader(self._source.ring_fd())
        for future in list(self._waiting.values()):
            future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_token(self) -> int:
        """A token that no other work has."""
        return next(_tokens)

    async def run(self, start: Callable[[int], None], what: str = "kernel task") -> Event:
        """Call `start` with a fresh token and await its event; raises KernelError when the event carries an
        error.
        """
        event = await self.event(start)
        if event.error:
            raise KernelError(what, event.error)
        return event

    def event(self, start: Callable[[int], None]) -> asyncio.Future[Event]:
        """Call `start` with a fresh token; the future gets its event, whatever the event's error."""
        token = self.new_token()
        future: asyncio.Future[Event] = self._loop.create_future()
        self._waiting[token] = future
        future.add_done_callback(lambda _: self._waiting.pop(token, None))
        try:
            start(token)
        except BaseException:
            future.cancel()
            raise
        return future

    def subscribe(self, token: int, callback: Callback) -> Callable[[], None]:
        """Call `callback` for every event with `token` (from new_token), until the function returned is
        called.
        """
        self._subscribers[token] = callback
        return lambda: self._subscribers.pop(token, None) and None

    def on(self, kind: EventKind, callback: Callback) -> None:
        """Call `callback` for every event of a kind whose token is not a submitter's: EventKind.CORRUPT."""
        self._by_kind[kind] = callback

    def _deliver(self) -> None:
        for event in self._source.ring_read():
            try:
                self._dispatch(event)
            except Exception:
                # One broken callback must not lose the events behind it, on which others wait.
                log.exception("callback for %s failed; please report this", event)

    def _dispatch(self, event: Event) -> None:
        if callback := self._by_kind.get(event.kind):
            callback(event)
        elif future := self._waiting.get(event.token):
            if not future.done():
                future.set_result(event)
        elif subscriber := self._subscribers.get(event.token):
            subscriber(event)
