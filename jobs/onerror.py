"""What a job does when an operation fails, by the user's policy.

policy    an error of the operation means
report    the job fails
ignore    try again, for ever; retries slow down, and events come once a second at most
enospc    no space left: as stop; anything else: as report
stop      the job is paused on the user's behalf; resume tries again
auto      as enospc
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import Enum
from typing import Final

from jobs.clock import Clock, TimerHandle

__all__ = ["Backoff", "ErrorAction", "EventLimiter", "IoStatus", "OnError", "Verdict", "choose_action"]

EVENT_INTERVAL: Final = 1.0  # seconds between two events on ignored errors
FIRST_RETRY: Final = 0.01  # seconds before the first retry of an ignored error
LAST_RETRY: Final = 1.0  # seconds before a retry at most


class OnError(Enum):
    """The user's policy for errors of one kind of operation."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class ErrorAction(Enum):
    """What is done about one error."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


class Verdict(Enum):
    """What the code that met the error has to do now."""

    RETRY = "retry"
    FAIL = "fail"


class IoStatus(Enum):
    """Whether a job was stopped by an error, and which."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"

    @classmethod
    def of(cls, failure: OSError) -> IoStatus:
        """The status that ``failure`` leaves a stopped job in."""
        return cls.NOSPACE if failure.errno == errno.ENOSPC else cls.FAILED


def choose_action(policy: OnError, failure: OSError) -> ErrorAction:
    """What ``policy`` says about ``failure``."""
    if policy in (OnError.ENOSPC, OnError.AUTO):
        return ErrorAction.STOP if failure.errno == errno.ENOSPC else ErrorAction.REPORT
    return ErrorAction(policy.value)


class Backoff:
    """Growing pauses between retries; back to short ones after a time without errors."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._delay = 0.0
        self._last = 0.0

    def next_delay(self) -> float:
        """Seconds to wait before the retry after an error that happened now."""
        now = self._clock.now()
        fresh = not self._delay or now - self._last > self._delay + LAST_RETRY
        self._delay = FIRST_RETRY if fresh else min(self._delay * 2, LAST_RETRY)
        self._last = now
        return self._delay


class EventLimiter:
    """Lets one event through per second; of those held back, the last follows when the second is over."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._timer: TimerHandle | None = None
        self._held: Callable[[], None] | None = None

    def submit(self, emit: Callable[[], None]) -> None:
        """Call ``emit`` now, or hold it back in place of what is held."""
        if self._timer is not None:
            self._held = emit
            return
        emit()
        self._timer = self._clock.call_later(EVENT_INTERVAL, self._expired)

    def flush(self) -> None:
        """Emit what is held back, at once, and let the next one through."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._release()

    def _expired(self) -> None:
        self._timer = None
        if held := self._held:
            self._held = None
            self.submit(held)

    def _release(self) -> None:
        if held := self._held:
            self._held = None
            held()
