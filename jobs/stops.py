"""Where a job's code stops: for a pause, a cancel, a limit, an error, or the user's word.

Design
    The job's task alone parks, naps and goes on. Verbs change the counts and flags and ring `wakeup`; a job
    that is parked shows the change at once, any other at its next stop.

        at work ──stop, count > 0 or quiesced──► parked ──count = 0 and not quiesced──► at work
                                                   └──── cancelled and not quiesced ──► at work, cleaning up
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import Enum
from typing import TypeVar

from jobs.clock import Clock, Wakeup
from jobs.core import JobCore
from jobs.errors import describe_failure
from jobs.hooks import JobEvent
from jobs.onerror import Backoff, ErrorAction, EventLimiter, IoStatus, OnError, Verdict, choose_action
from jobs.status import JobStatus

__all__ = ["Completion", "JobStops", "call_hook"]

log = logging.getLogger(__name__)
T = TypeVar("T")


class Completion(Enum):
    """How a ready job was told to end."""

    COMPLETE = "complete"  #: job-complete: for a mirror, switch over to the copy
    SOFT_CANCEL = "soft-cancel"  #: keep the result as it is now, change nothing else


async def call_hook(hook: Callable[[], Awaitable[None] | None]) -> None:
    """Call a hook that may be async."""
    outcome = hook()
    if inspect.isawaitable(outcome):
        await outcome


class JobStops(JobCore):
    """Pause, quiesce, waits and error policy. Loop thread only."""

    def __init__(
        self, *, auto_finalize: bool = True, auto_dismiss: bool = True, clock: Clock | None = None
    ) -> None:
        super().__init__(auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, clock=clock)
        self.wakeup = Wakeup(self.clock)
        # pause
        self.pause_count = 1
        self.user_paused = False
        self._quiesced = 0
        self._parked = False
        self._waiting = False
        self._still = asyncio.Event()  # set while the job's code cannot be doing anything
        self._still.set()
        # how a ready job is to end
        self.completion: Completion | None = None
        # errors
        self.io_status = IoStatus.OK
        self._backoff: dict[str, Backoff] = {}
        self._ignored: dict[str, EventLimiter] = {}

    # ---- for run() to use ------------------------------------------------------------------------------

    async def pause_point(self) -> None:
        """Stop here while the job is paused or quiesced; let other tasks run in any case.

        Call it from the task that runs `run`, with nothing in flight that others could take for rest.
        Raises asyncio.CancelledError once the job is cancelled by force.
        """
        self._check_own_task()
        if not self._should_park:
            await asyncio.sleep(0)
        while self._should_park and not self.force_cancelled:
            await call_hook(self.before_pause)
            await self._park()
            await call_hook(self.after_pause)
        if self.force_cancelled:
            raise asyncio.CancelledError

    async def sleep(self, seconds: float) -> None:
        """Do nothing for ``seconds`` but pause, or be cancelled, at once. Time spent paused counts."""
        until = self.clock.now() + seconds
        await self.pause_point()
        while (left := until - self.clock.now()) > 0:
            await self._nap(left)
            await self.pause_point()

    async def nap(self, seconds: float | None = None) -> None:
        """As `sleep`, but return early whenever anything about the job changes (a verb, an option)."""
        await self.pause_point()
        await self._nap(seconds)
        await self.pause_point()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """A stop that lasts until ``condition()``; whoever makes it true rings `wakeup`."""
        await self.pause_point()
        while not condition():
            await self._nap(None)
            await self.pause_point()

    async def uninterrupted(self, work: Awaitable[T]) -> T:
        """Await ``work`` to its end even if the job is cancelled meanwhile; then the cancel takes effect."""
        future = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait({future})
                except asyncio.CancelledError:
                    continue
            if not future.cancelled() and (failure := future.exception()) is not None:
                log.info("job %s: failed while being cancelled: %s", self.name, failure)
            raise

    def set_ready(self) -> None:
        """The result is in sync: the job goes on until it is told to complete. Again: without effect."""
        if self.is_ready:
            return
        self._set_status(JobStatus.READY)
        self._announce(JobEvent.READY, self._event_progress())

    async def wait_completion_requested(self) -> Completion:
        """Wait, as a ready job, until the user says how to end."""
        await self.wait_for(lambda: self.completion is not None)
        assert self.completion is not None
        return self.completion

    async def handle_error(self, operation: str, failure: OSError, policy: OnError) -> Verdict:
        """Treat ``failure`` of ``operation`` (``read``, ``write``, …) by ``policy``; say what to do next.

        Emits the error event. May take long: until the user resumes (stop), or for a growing delay (ignore).
        """
        action = choose_action(policy, failure)
        if action is ErrorAction.IGNORE:
            await self._ignore(operation, failure)
            return Verdict.RETRY
        self._emit_error(operation, failure, action)
        if action is ErrorAction.REPORT:
            return Verdict.FAIL
        if self.io_status is IoStatus.OK:
            self.io_status = IoStatus.of(failure)
        if not self.user_paused:
            self.user_paused = True
            self.pause()
        await self.pause_point()
        return Verdict.RETRY

    # ---- for others ------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether the job's code is at work just now, rather than parked, sleeping or over."""
        return self.started and not self.run_over and not self._parked and not self._waiting

    @property
    def stall(self) -> str | None:
        """Why the job does not move just now, in a few words; None if it does, or if nothing is known."""
        if self.io_status is not IoStatus.OK:
            return f"stopped by an error ({self.io_status.value})"
        if self.user_paused:
            return "paused by the user"
        return self.progress.stall

    def pause(self) -> None:
        """Count one more reason to be paused."""
        self.pause_count += 1
        self._pause_changed()

    def resume(self) -> None:
        """Count one reason less."""
        assert self.pause_count > 0, f"job {self.name} resumed more often than paused"
        self.pause_count -= 1
        self._pause_changed()

    @asynccontextmanager
    async def quiesced(self) -> AsyncIterator[None]:
        """The job stands still inside: it does nothing, and shows no change of status because of it.

        Entering waits for the job's next stop, or its end. For the job itself it is without effect.
        """
        if self._task is not None and asyncio.current_task() is self._task:
            yield
            return
        self._quiesced += 1
        self._pause_changed()
        try:
            await self._still.wait()
            yield
        finally:
            self._quiesced -= 1
            self._pause_changed()

    # ---- inside ----------------------------------------------------------------------------------------

    @property
    def _should_park(self) -> bool:
        return self.pause_count > 0 or self._quiesced > 0

    async def _park(self) -> None:
        self._parked = True
        self._still.set()
        cancelled = False
        self._pause_changed()
        while self._quiesced or (self.pause_count and not cancelled):
            try:
                await self.wakeup.wait()
            except asyncio.CancelledError:  # whoever holds the job still does not want to see it clean up
                cancelled = True
        self._parked = False
        self._still.clear()
        self._show(paused=False)
        if cancelled:
            raise asyncio.CancelledError

    def _pause_changed(self) -> None:
        """Show a parked job as what it is, and let a job that waits look at its flags."""
        if self._parked:
            self._show(paused=self.pause_count > 0)
        self.wakeup.ring()

    def _show(self, *, paused: bool) -> None:
        pairs = [(JobStatus.RUNNING, JobStatus.PAUSED), (JobStatus.READY, JobStatus.STANDBY)]
        for active, stopped in pairs:
            old, new = (active, stopped) if paused else (stopped, active)
            if self.status is old:
                self._set_status(new)
                return

    async def _nap(self, seconds: float | None) -> None:
        if self._should_park or self.force_cancelled:
            return
        self._waiting = True
        try:
            await self.wakeup.wait(seconds)
        finally:
            self._waiting = False

    async def _ignore(self, operation: str, failure: OSError) -> None:
        limiter = self._ignored.setdefault(operation, EventLimiter(self.clock))
        limiter.submit(lambda: self._emit_error(operation, failure, ErrorAction.IGNORE))
        await self.sleep(self._backoff.setdefault(operation, Backoff(self.clock)).next_delay())

    def _emit_error(self, operation: str, failure: OSError, action: ErrorAction) -> None:
        details = {"operation": operation, "action": action.value, "error": describe_failure(failure)}
        self._announce(JobEvent.ERROR, details)

    def _check_own_task(self) -> None:
        if asyncio.current_task() is not self._task:
            raise RuntimeError(f"job {self.name}: a stop was called outside the task that runs the job")

    def _flush_ignored(self) -> None:
        """Send the last of the error events that were held back."""
        for limiter in self._ignored.values():
            limiter.flush()
