"""Events: how they are defined, and the bus that carries them to every monitor.

An event is defined once, at module level in any module of ``nbd_backend/control/commands/``:

    class ExportDeleted(msgspec.Struct, frozen=True):
        id: str

    BLOCK_EXPORT_DELETED = Event("BLOCK_EXPORT_DELETED", ExportDeleted, since="5.2")

and emitted anywhere on the loop thread: ``context.events.emit("BLOCK_EXPORT_DELETED", {"id": "e0"})``.

An event kind that can come in floods has a ``limit``: a function from its data to a key. Of the events with
one key one is delivered per second; of those held back meanwhile, the last. The key None means no limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from nbd_backend.control.protocol import encode_event

__all__ = ["Event", "EventBus", "Subscriber"]

LIMIT_INTERVAL: Final = 1.0  # seconds between two events with one key


@dataclass(frozen=True, slots=True)
class Event:
    """The definition of an event kind; ``since`` is the release of the interface that introduced it."""

    name: str
    data: type[msgspec.Struct]
    since: str
    limit: Callable[[dict[str, Any]], Hashable] | None = None


class Subscriber(Protocol):
    """Who receives events."""

    def deliver(self, message: bytes) -> None:
        """Take one encoded event. Must neither block nor raise, and may unsubscribe."""


@dataclass(slots=True)
class _Window:
    """The second that follows a delivered event of a limited kind."""

    timer: asyncio.TimerHandle
    held: bytes | None = field(default=None)


class EventBus:
    """Carries events to the subscribers. Loop thread only.

    ``check`` compares each event's data with its definition, for tests: a mismatch raises
    msgspec.ValidationError from `emit`.
    """

    def __init__(
        self,
        definitions: Mapping[str, Event],
        *,
        check: bool = False,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._definitions = definitions
        self._check = check
        self._clock = clock
        self._subscribers: dict[Subscriber, None] = {}
        self._windows: dict[Hashable, _Window] = {}

    def subscribe(self, subscriber: Subscriber) -> None:
        """Deliver events to ``subscriber`` from now on."""
        self._subscribers[subscriber] = None

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Stop delivering to ``subscriber``; no effect if it does not subscribe."""
        self._subscribers.pop(subscriber, None)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Tell all subscribers that ``name`` happened now. Raises KeyError for an undefined event."""
        definition = self._definitions[name]
        if self._check:
            msgspec.convert(data, definition.data, strict=True)
        message = encode_event(name, data, self._clock() // 1000)
        key = definition.limit(data) if definition.limit else None
        if key is None:
            self._deliver(message)
        elif window := self._windows.get((name, key)):
            window.held = message
        else:
            self._deliver_limited((name, key), message)

    def close(self) -> None:
        """Deliver what is held back and forget the subscribers."""
        for window in self._windows.values():
            window.timer.cancel()
            if window.held is not None:
                self._deliver(window.held)
        self._windows.clear()
        self._subscribers.clear()

    def _deliver(self, message: bytes) -> None:
        for subscriber in tuple(self._subscribers):
            subscriber.deliver(message)

    def _deliver_limited(self, key: Hashable, message: bytes) -> None:
        self._deliver(message)
        timer = asyncio.get_running_loop().call_later(LIMIT_INTERVAL, self._window_ends, key)
        self._windows[key] = _Window(timer)

    def _window_ends(self, key: Hashable) -> None:
        held = self._windows.pop(key).held
        if held is not None:
            self._deliver_limited(key, held)
