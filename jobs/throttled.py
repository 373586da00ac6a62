"""Jobs whose speed the user can bound."""

from __future__ import annotations

from jobs.clock import Clock
from jobs.errors import JobError
from jobs.hooks import settable
from jobs.job import Job
from jobs.ratelimit import RateLimit
from jobs.status import Verb

__all__ = ["ThrottledJob"]


class ThrottledJob(Job):
    """A job whose speed can be bounded: option ``speed`` in bytes a second, 0 for no bound."""

    def __init__(
        self,
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, clock=clock)
        self.limit = RateLimit(self.clock, _check_speed(speed), wakeup=self.wakeup)
        self._throttled = False

    @property
    def speed(self) -> int:
        """The bound in bytes a second; 0 is none."""
        return self.limit.speed

    @settable("speed", int, verb=Verb.SET_SPEED)
    def set_speed(self, speed: int) -> None:
        """Bound the work from now on to ``speed`` bytes a second. Takes effect at once."""
        self.limit.speed = _check_speed(speed)

    async def throttle(self, size: int) -> None:
        """Return when ``size`` bytes may be worked on; a stop like `pause_point`."""
        self._waiting = self._throttled = self.limit.delay() > 0
        try:
            await self.limit.wait(size, self.pause_point)
        finally:
            self._waiting = self._throttled = False

    @property
    def stall(self) -> str | None:
        return super().stall or (f"held to {self.speed} bytes/s" if self._throttled else None)


def _check_speed(speed: int) -> int:
    if speed < 0:
        raise JobError("Parameter 'speed' expects a non-negative value")
    return speed
