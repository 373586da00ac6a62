"""The loop that block jobs share: slices of the kernel's copy engine, and what to do about their errors.

A slice is at most 64 MiB or 50 ms of copying, done by the kernel's threads. Between two slices the job can be
paused, cancelled and slowed down; so all of that takes effect within a slice. Under a speed limit a slice is as
large as what the limit allows for 100 ms.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from jobs.block.blockjob import BlockJob
from jobs.errors import JobError
from jobs.onerror import OnError, Verdict
from jobs.ratelimit import SLICE
from nbd_backend.block.events import EventRing
from nbd_backend.block.kernel import Copier, Event, Side

__all__ = ["CopyLoop", "ErrorPolicies"]

SLICE_BYTES = 64 << 20
SLICE_MS = 50
_OPERATIONS = {Side.SOURCE: "read", Side.TARGET: "write"}


@dataclass(frozen=True, slots=True)
class ErrorPolicies:
    """What the user wants done about errors of the background copy."""

    source: OnError = OnError.REPORT
    target: OnError = OnError.REPORT

    def of(self, side: Side) -> OnError:
        """The policy for one side; the local store is ours, and its errors always end the job."""
        return {Side.SOURCE: self.source, Side.TARGET: self.target}.get(side, OnError.REPORT)


class CopyLoop:
    """Drives one copier on behalf of one job. Loop thread only."""

    def __init__(
        self,
        job: BlockJob,
        ring: EventRing,
        copier: Copier,
        policies: ErrorPolicies,
        check: Callable[[], None] | None = None,
    ) -> None:
        """``check`` is called before and after each slice; it raises to end the job."""
        self._job = job
        self._ring = ring
        self._copier = copier
        self._policies = policies
        self._check = check or (lambda: None)

    async def copy_all(self) -> None:
        """Copy until nothing is left. Raises JobError when an error ends the job."""
        self._show()
        while self._copier.remaining:
            await self.slice()

    async def slice(self, *, store_only: bool = False) -> None:
        """Copy one slice's worth, waiting for the speed limit first; retries, pauses or fails on errors."""
        self._check()
        size = self._slice_size()
        await self._job.throttle(size)
        event = await self._job.uninterrupted(self._run(size, store_only))
        self._check()
        self._show()
        if event.error:
            await self._treat(event)

    async def _run(self, size: int, store_only: bool) -> Event:
        return await self._ring.event(
            lambda token: self._copier.start_slice(size, SLICE_MS, store_only, token)
        )

    def _slice_size(self) -> int:
        """Bytes for the next slice; the limit charges what is asked for, so no more than is left."""
        speed = self._job.speed
        if not speed:
            return SLICE_BYTES
        return max(1, min(SLICE_BYTES, int(speed * SLICE), self._copier.remaining))

    def _show(self) -> None:
        progress = self._job.progress
        done = progress.total - self._copier.remaining
        if done > progress.current:
            progress.advance(done - progress.current)

    async def _treat(self, event: Event) -> None:
        side = Side(event.c)
        failure = OSError(event.error, os.strerror(event.error))
        if side is Side.STORE:
            raise JobError(f"The local store of old data failed at offset {event.b}: {failure.strerror}")
        verdict = await self._job.handle_error(_OPERATIONS[side], failure, self._policies.of(side))
        if verdict is Verdict.FAIL:
            raise JobError(os.strerror(event.error or errno.EIO))
