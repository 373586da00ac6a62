"""Time for jobs, injected so that tests need not sleep, and the one primitive on which a job waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

__all__ = ["Clock", "LoopClock", "TimerHandle", "Wakeup"]


class TimerHandle(Protocol):
    """A timer that has been set."""

    def cancel(self) -> None:
        """Forget the timer; without effect when it has fired."""


class Clock(Protocol):
    """Monotonic seconds and timers. Used on the loop's thread only."""

    def now(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> TimerHandle:
        """Call ``callback`` on the loop's thread in ``delay`` seconds."""


class LoopClock:
    """The clock of the running event loop."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def call_later(self, delay: float, callback: Callable[[], None]) -> TimerHandle:
        return asyncio.get_running_loop().call_later(delay, callback)


class Wakeup:
    """Wait for a time, or until somebody rings: whichever comes first.

    A ring wakes those who wait at that moment and is not remembered: check the condition, then wait,
    with no ``await`` between the two.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiters: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """Wake everybody who waits."""
        for waiter in self._waiters:
            _resolve(waiter)

    async def wait(self, timeout: float | None = None) -> None:
        """Return after ``timeout`` seconds (None: never) or at the next ring."""
        waiter = asyncio.get_running_loop().create_future()
        timer = None if timeout is None else self._clock.call_later(timeout, lambda: _resolve(waiter))
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if timer is not None:
                timer.cancel()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
