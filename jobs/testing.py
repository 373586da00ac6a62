"""Tools to test job types without a server, a disk, or waiting: a clock to turn and an ear for events.

clock = FakeClock()
events = EventRecorder()
manager = JobManager(events, clock=clock)
job = manager.create(MyJob(clock=clock), "j1")
manager.start(job)
await clock.advance(5)
assert events.words() == ["created", "running", …]
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any, Final

from jobs.hooks import JobEvent

__all__ = ["EventRecorder", "FakeClock", "settle"]

#: events of jobs of all types, beside the status changes
_GENERIC: Final = {event.value for event in JobEvent} - {JobEvent.STATUS.value}


async def settle(rounds: int = 50) -> None:
    """Let everything run that is ready to run, and what that makes ready, ``rounds`` deep."""
    for _ in range(rounds):
        await asyncio.sleep(0)


class _Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeClock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, _Timer]] = []

    def now(self) -> float:
        """Seconds since an arbitrary moment."""
        return self._now

    def call_later(self, delay: float, callback: Callable[[], None]) -> _Timer:
        """Call ``callback`` when the clock has been moved on by ``delay`` seconds."""
        timer = _Timer(callback)
        heapq.heappush(self._timers, (self._now + delay, next(self._order), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Move on by ``seconds``; whatever becomes due meanwhile runs at its own time."""
        until = self._now + seconds
        await settle()
        while self._timers and self._timers[0][0] <= until:
            due, _, timer = heapq.heappop(self._timers)
            if timer.callback is None:
                continue
            self._now = max(self._now, due)
            timer.callback()
            await settle()
        self._now = until
        await settle()


class EventRecorder:
    """Keeps every event; use it as a manager's ``events``."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """The events since the last time."""
        taken, self.events = self.events, []
        return taken

    def of(self, name: str) -> list[dict[str, Any]]:
        """The data of all events called ``name``."""
        return [data for event, data in self.events if event == name]

    def words(self, *, ids: bool = False, generic: bool = False) -> list[str]:
        """The events as short words: a status, or an event's name with ``:action`` and ``:error`` members.

        With ``ids`` the job's id follows each, after a blank. Without ``generic`` the events that all
        types of jobs have (JOB_STARTED and so on) are left out, beside those of their subsystem.
        """
        kept = [(name, data) for name, data in self.events if generic or name not in _GENERIC]
        return [_word(name, data) + (f" {_job_of(data)}" if ids else "") for name, data in kept]


def _job_of(data: dict[str, Any]) -> str:
    return str(data.get("id", data.get("device")))


def _word(name: str, data: dict[str, Any]) -> str:
    if name == "JOB_STATUS_CHANGE":
        return str(data["status"])
    action = f":{data['action']}" if "action" in data else ""
    return name + action + (":error" if "error" in data else "")
