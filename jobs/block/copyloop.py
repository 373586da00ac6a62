"""The loop that block jobs share: slices of the kernel's copy engine, and what to do about their errors.

A slice is at most 64 MiB or 50 ms of copying, done by the kernel's threads. Between two slices the job can
be paused, cancelled and slowed down; so all of that takes effect within a slice. Under a speed limit a slice
is as large as what the limit allows for 100 ms. What counts is what was read: holes cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jobs.block.blockjob import BlockJob
from jobs.errors import JobError
from jobs.onerror import OnError, Verdict
from nbd_backend.block.events import EventRing
from nbd_backend.block.kernel import Copier, Side

__all__ = ["CopyLoop", "ErrorPolicies"]

SLICE_BYTES = 64 << 20
SLICE_MS = 50


@dataclass(frozen=True, slots=True)
class ErrorPolicies:
    """What the user wants done about errors of the background copy."""

    source: OnError = OnError.REPORT
    target: OnError = OnError.REPORT


class CopyLoop:
    """Runs the slices of one copier for one job, in the job's task."""

    def __init__(
        self,
        job: BlockJob,
        ring: EventRing,
        copier: Copier,
        policies: ErrorPolicies,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``check`` is called before and after each slice; it raises to end the job."""
        self._job = job
        self._ring = ring
        self._copier = copier
        self._treatments = {Side.SOURCE: ("read", policies.source), Side.TARGET: ("write", policies.target)}
        self._check = check

    async def copy_all(self) -> None:
        """Copy until nothing is left. Raises JobError when an error ends the job."""
        self.show_progress()
        while self._copier.remaining:
            await self.slice()

    async def slice(self, *, store_only: bool = False) -> None:
        """Copy one slice's worth, waiting for the speed limit first; retries, pauses or fails on errors."""
        limit = self._job.limit
        self._check()
        await self._job.throttle(0)
        self._check()
        start = partial(self._copier.start_slice, limit.budget(SLICE_BYTES), SLICE_MS, store_only)
        event = await self._job.uninterrupted(self._ring.event(start))
        limit.charge(event.a if event.error else event.b)
        self.show_progress()
        self._check()
        if event.error and event.c == Side.STORE:
            reason = os.strerror(event.error)
            raise JobError(f"The local store of old data failed at offset {event.b}: {reason}")
        if event.error:
            await self._treat(Side(event.c), event.error)

    async def task(self, side: Side, start: Callable[[int], None]) -> None:
        """Run a task of the kernel's that works on one side, until it succeeds or its error ends the job."""
        while error := (await self._job.uninterrupted(self._ring.event(start))).error:
            await self._treat(side, error)

    def show_progress(self) -> None:
        """Tell how much is done, going by what is left."""
        progress = self._job.progress
        progress.advance(max(0, progress.total - self._copier.remaining - progress.current))

    async def _treat(self, side: Side, error: int) -> None:
        operation, policy = self._treatments[side]
        failure = OSError(error, os.strerror(error))
        if await self._job.handle_error(operation, failure, policy) is Verdict.FAIL:
            raise failure
