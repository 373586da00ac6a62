"""A bound on how much work is started per second.

Design: a leaky bucket. What was admitted is a debt that drains at ``speed`` bytes a second. Work is
admitted while the debt is below one slice's worth (100 ms); so the long-run rate is exact, a burst is at
most one slice plus one request, and a request larger than a slice is paid for by the ones after it.
A new speed takes effect at once and never inherits a debt of more than one of its own slices.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from jobs.clock import Clock, Wakeup

__all__ = ["SLICE", "RateLimit"]

#: seconds over which the limit holds
SLICE: Final = 0.1


async def _no_checkpoint() -> None:
    """A wait that nothing else needs to look into."""


class RateLimit:
    """Admits at most ``speed`` bytes a second; 0 means no limit. Loop thread only."""

    def __init__(self, clock: Clock, speed: int = 0, *, wakeup: Wakeup | None = None) -> None:
        """``wakeup`` is what `wait` sleeps on; whoever rings it makes waiters look again."""
        self._clock = clock
        self._wakeup = wakeup or Wakeup(clock)
        self._debt = 0.0
        self._settled = 0.0
        self._speed = 0
        self.speed = speed

    @property
    def speed(self) -> int:
        """Bytes a second, 0 for no limit. Setting it acts on waits under way."""
        return self._speed

    @speed.setter
    def speed(self, speed: int) -> None:
        if speed < 0:
            raise ValueError(f"speed cannot be negative: {speed}")
        self._drain()
        self._speed = speed
        self._debt = min(self._debt, self._quota)
        self._wakeup.ring()

    def budget(self, most: int, least: int = 1) -> int:
        """How many bytes one request may ask for so that it stays within a slice: ``least`` to ``most``."""
        return most if not self._speed else max(least, min(most, int(self._quota)))

    def delay(self) -> float:
        """Seconds until the next request is admitted; 0 when it is now."""
        self._drain()
        if not self._speed or self._debt < self._quota or not self._debt:
            return 0.0
        # Aim a little below the mark: at the mark itself rounding could ask for a wait of nothing for ever.
        return (self._debt - self._quota) / self._speed + SLICE / 100

    def charge(self, size: int) -> None:
        """Count ``size`` bytes as started now, admitted or not."""
        self._drain()
        if self._speed:
            self._debt += size

    async def wait(self, size: int, checkpoint: Callable[[], Awaitable[None]] = _no_checkpoint) -> None:
        """Return when ``size`` bytes may be started, and charge them.

        ``checkpoint`` is awaited before each look at the limit, at least once.
        """
        await checkpoint()
        while (delay := self.delay()) > 0:
            await self._wakeup.wait(delay)
            await checkpoint()
        self.charge(size)

    @property
    def _quota(self) -> float:
        return self._speed * SLICE

    def _drain(self) -> None:
        if not self._speed:
            self._debt = 0.0
            return
        now = self._clock.now()
        self._debt = max(0.0, self._debt - (now - self._settled) * self._speed)
        self._settled = now
