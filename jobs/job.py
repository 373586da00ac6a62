"""One job: a coroutine with an identity, a status, progress, verbs and events.

Design
    A job's own code is `Job.run`, in a task of its own, and four hooks around its end. Everything else here
    reacts to verbs. All of it lives on one event loop's thread; nothing here is for other threads.

    Flags are set by verbs at once; the job's code meets them at its next *stop*: `pause_point`, or one of
    the waits built on it (`sleep`, `wait_completion_requested`, `handle_error`, `ThrottledJob.throttle`).

        pause      counted. At a stop with a count above 0 the job parks: running → paused, ready → standby,
                   and back when the count is 0. A job is created with a count of 1, which start takes away.
        quiesce    as pause, for the server's own needs: the job parks, but shows no change of status.
        cancel     soft only for types that declare it, and only when ready; it is then one way to complete.
                   Otherwise forced: asyncio.CancelledError is thrown into the job's task. Work that must not
                   be torn is awaited through `Job.uninterrupted`.

    What happens after `run` has ended is decided by the job's `Transaction`, which calls `prepare`, `commit`,
    `abort` and `clean`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from jobs.clock import Clock
from jobs.core import Host
from jobs.errors import JobError
from jobs.hooks import JobEvent
from jobs.onerror import IoStatus
from jobs.status import JobStatus, Verb, apply_verb, refusal
from jobs.stops import Completion, JobStops, call_hook
from jobs.transaction import Transaction

__all__ = ["Completion", "Job"]

log = logging.getLogger(__name__)
Hook = Callable[[], Awaitable[None] | None]


class Job(JobStops):
    """Base of all job types. A subclass defines `type`, `run`, and the hooks it needs (`jobs.hooks`).

    Until a manager has created the job, its status is undefined and it has no id. Loop thread only.
    """

    def __init__(
        self, *, auto_finalize: bool = True, auto_dismiss: bool = True, clock: Clock | None = None
    ) -> None:
        super().__init__(auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, clock=clock)
        self.cancel_requested = False

    def info(self) -> dict[str, Any]:
        """The job's entry in query-jobs."""
        info: dict[str, Any] = {
            "id": self.id,
            "type": self.type,
            "status": self.status.value,
            "current-progress": self.progress.current,
            "total-progress": self.progress.total,
        }
        if self.error is not None:
            info["error"] = self.error
        if not self.ended:
            details = {"rate": self.progress.rate, "eta": self.progress.eta, "stall": self.stall}
            info.update({name: value for name, value in details.items() if value is not None})
        return {**info, **self.extra_info()}

    # ---- verbs -----------------------------------------------------------------------------------------
    # Called for users, through the manager; each first asks the verb table.

    def apply_verb(self, verb: Verb) -> None:
        """Raise `JobError` unless the job accepts ``verb`` now."""
        apply_verb(self.name, self.status, verb)
        if self.transaction.too_late_for(verb):
            raise refusal(self.name, self.status, verb)

    def user_pause(self) -> None:
        """Pause on the user's behalf; takes effect at the job's next stop."""
        self.apply_verb(Verb.PAUSE)
        if self.user_paused:
            raise JobError("Job is already paused")
        self.user_paused = True
        self.pause()

    def user_resume(self) -> None:
        """Take back the user's pause, and the one after an error."""
        if not self.user_paused:
            raise JobError("Can't resume a job that was not paused")
        self.apply_verb(Verb.RESUME)
        self._end_user_pause()

    async def user_cancel(self, force: bool) -> None:
        """Cancel. Returns at once for a job at work, whose events tell the rest; else when it is over."""
        self.apply_verb(Verb.CANCEL)
        self.cancel(force)
        if self.force_cancelled and (self.ended or not self.started):
            await self.transaction.abort(self)

    async def user_complete(self) -> None:
        """Let a ready job end the way its type is meant to."""
        self.apply_verb(Verb.COMPLETE)
        if self.cancel_requested or not self.completable:
            raise JobError(f"The active block job '{self.name}' cannot be completed")
        await call_hook(self.on_complete)
        if not self.cancel_requested:
            self.completion = Completion.COMPLETE
            self.wakeup.ring()

    async def user_finalize(self) -> None:
        """Finalize the job's whole transaction; returns when every member is concluded."""
        self.apply_verb(Verb.FINALIZE)
        await self.transaction.finalize()

    def user_dismiss(self) -> None:
        """Forget a concluded job."""
        self.apply_verb(Verb.DISMISS)
        self._vanish()

    async def set_option(self, name: str, value: object) -> None:
        """Change the option ``name``; ``value`` is JSON data. Raises `JobError`, having changed nothing."""
        option = self.changeable.get(name)
        if option is None:
            known = ", ".join(sorted(self.changeable)) or "none"
            raise JobError(
                f"Job '{self.name}' of type '{self.type}' has no option '{name}' that can be changed"
                f" (it has: {known})"
            )
        self.apply_verb(option.verb)
        try:
            converted = msgspec.convert(value, option.kind)
        except msgspec.ValidationError as failure:
            raise JobError(f"Invalid value for option '{name}' of job '{self.name}': {failure}") from failure
        await call_hook(lambda: getattr(self, option.attribute)(converted))
        self.wakeup.ring()

    def cancel(self, force: bool) -> None:
        """Ask the job to end, without looking at the verb table; once it commits, without effect.

        See this module's design for what ``force`` means.
        """
        if self.transaction.too_late_for(Verb.CANCEL):
            return
        force = force or not (self.soft_cancellable and self.is_ready)
        if self.user_paused:
            self._end_user_pause()
        self.cancel_requested = True
        if not force:
            self.completion = Completion.SOFT_CANCEL
        elif not self.force_cancelled:
            self.force_cancelled = True
            if self._task is not None:
                self._task.cancel()
        self._call_guarded(lambda: self.on_cancel(force), "on_cancel")
        self.wakeup.ring()

    # ---- for manager and transaction -------------------------------------------------------------------

    def attach(self, host: Host, job_id: str | None, transaction: Transaction, *, explicit: bool) -> None:
        """Become known: undefined → created."""
        self.id, self._host, self._transaction, self.explicit_id = job_id, host, transaction, explicit
        self._set_status(JobStatus.CREATED)

    async def call_set_up(self) -> None:
        """Run `set_up`. A cancel meanwhile waits for its end, and is then raised here as `JobError`."""
        self._set_up_over.clear()
        try:
            await call_hook(self.set_up)
        finally:
            self._set_up_over.set()
        if self.force_cancelled:
            raise JobError(f"Job '{self.name}' was cancelled while it was being set up")

    def start(self) -> None:
        """Begin to run: created → running. The job's first stop comes before its first own step."""
        self._set_status(JobStatus.RUNNING)
        self.started = True
        self._still.clear()
        self.pause_count -= 1
        self._announce(JobEvent.STARTED, {})
        self._task = asyncio.get_running_loop().create_task(self._main(), name=f"job {self.name}")
        self._task.add_done_callback(self._run_ended)

    def discard(self) -> None:
        """Drop a job that was never started: created → null, with no hook called."""
        self._vanish()

    async def wait_run_over(self) -> None:
        """Return when the job's task, or its `set_up`, has ended; at once if it was never started."""
        await self._set_up_over.wait()
        if self.started:
            await self._run_over.wait()

    def enter_waiting(self) -> None:
        """The work is done: → waiting."""
        self._set_status(JobStatus.WAITING)

    def enter_pending(self) -> None:
        """The work of the whole transaction is done: waiting → pending."""
        self._set_status(JobStatus.PENDING)
        if not self.auto_finalize:
            self._announce(JobEvent.PENDING, {})

    def enter_aborting(self) -> None:
        """The job failed or is cancelled; again: without effect."""
        if self.status is not JobStatus.ABORTING:
            self._set_status(JobStatus.ABORTING)

    async def call_prepare(self) -> bool:
        """Run `prepare`; whether it succeeded. Failure makes the job aborting."""
        return await self._call_recording(self.prepare)

    async def conclude(self) -> None:
        """Commit or abort, clean up, tell, and be over."""
        if self.failed:
            self.enter_aborting()
            await self._call_logging(self.abort)
        else:
            await self._call_recording(self.commit)
        await self._call_recording(self.clean)
        if self.started:
            self._announce_end()
        self.transaction.remove(self)
        self._set_status(JobStatus.CONCLUDED)
        self._concluded.set()
        if self.auto_dismiss or not self.started:
            self._vanish()

    # ---- inside ----------------------------------------------------------------------------------------

    async def _main(self) -> None:
        await self.pause_point()
        await self.run()

    def _run_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self.force_cancelled = True
        elif (failure := task.exception()) is not None:
            self._record(failure, "run")
        self._flush_ignored()
        self._still.set()
        self._run_over.set()
        self.transaction.member_ended(self)

    def _end_user_pause(self) -> None:
        self._call_guarded(self.on_resume, "on_resume")
        self.io_status = IoStatus.OK
        self.user_paused = False
        self.resume()

    def _announce_end(self) -> None:
        if self.force_cancelled:
            self._announce(JobEvent.CANCELLED, self._event_progress())
            return
        details = {**self._event_progress(), "success": self.error is None}
        if self.error is not None:
            details["error"] = self.error
        self._announce(JobEvent.COMPLETED, details)

    def _vanish(self) -> None:
        self.transaction.remove(self)
        self._set_status(JobStatus.NULL)
        self._concluded.set()
        if self._host is not None:
            self._host.forget(self)

    async def _call_recording(self, hook: Hook) -> bool:
        try:
            await call_hook(hook)
        except Exception as failure:  # the hook may be anybody's code; its failure is the job's result
            self._record(failure, getattr(hook, "__name__", "a hook"))
            self.enter_aborting()
            return False
        return True

    async def _call_logging(self, hook: Hook) -> None:
        try:
            await call_hook(hook)
        except Exception:  # the job has failed already; the rest of its end must not be lost
            log.exception("job %s: %s failed", self.name, getattr(hook, "__name__", "a hook"))

    def _call_guarded(self, hook: Callable[[], None], where: str) -> None:
        try:
            hook()
        except Exception:  # a verb must not fail half-way because of a hint to the job
            log.exception("job %s: %s failed", self.name, where)
