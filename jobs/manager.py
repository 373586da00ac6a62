"""All jobs of a server: their ids, their list, and the verbs by id."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from jobs.clock import Clock, LoopClock
from jobs.core import JobCore
from jobs.errors import InvalidJobId, JobError, JobNotFound
from jobs.job import Job
from jobs.status import JobStatus
from jobs.transaction import Transaction

__all__ = ["JobManager", "valid_job_id"]

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


def valid_job_id(text: str) -> bool:
    """Whether ``text`` is well formed: a letter, then letters, digits, and ``- . _``."""
    return _ID.fullmatch(text) is not None


class JobManager:
    """Creates, starts, finds and steers jobs. Loop thread only.

    ``events(name, data)`` receives every event, in order, from within the call that causes it; it must
    neither raise nor call back. Errors of all verbs are `JobError`, with texts that existing clients know.
    """

    def __init__(self, events: Callable[[str, dict[str, Any]], None], *, clock: Clock | None = None) -> None:
        self._events = events
        self.clock: Clock = clock or LoopClock()
        self._jobs: list[Job] = []  # newest first
        self._closing = False
        self._observers: list[Callable[[Job], None]] = []

    # ---- creating --------------------------------------------------------------------------------------

    def create(
        self,
        job: Job,
        job_id: str | None = None,
        *,
        transaction: Transaction | None = None,
        internal: bool = False,
    ) -> Job:
        """Make ``job`` known under ``job_id``: it is created, and waits for `start`. Returns ``job``.

        Without an id the job type's default is taken, or one made from it; a type without default, and a
        malformed or taken id, are refused with `InvalidJobId`. An ``internal`` job has no id and stays
        invisible. With ``transaction`` the job ends together with its members.
        """
        if self._closing:
            raise JobError(f"The server is shutting down: no new job of type '{job.type}' can be created")
        if internal and job_id is not None:
            raise InvalidJobId("Cannot specify job ID for internal job")
        chosen = None if internal else self._choose_id(job, job_id)
        transaction = transaction or Transaction()
        transaction.add(job)
        self._jobs.insert(0, job)
        job.attach(self, chosen, transaction, explicit=job_id is not None)
        for created in self._observers:
            created(job)
        return job

    def observe(self, created: Callable[[Job], None]) -> None:
        """Call ``created`` for every job from now on, once it has its id."""
        self._observers.append(created)

    def start(self, job: Job) -> None:
        """Let a created job run."""
        job.start()

    async def launch(self, job: Job, job_id: str | None = None) -> Job:
        """Create, set up and start a job of its own; one that cannot be set up is discarded."""
        self.create(job, job_id)
        try:
            await job.call_set_up()
        except BaseException:
            if not job.force_cancelled:  # else whoever cancelled it sees it to its end
                self.discard(job)
            raise
        self.start(job)
        return job

    def discard(self, job: Job) -> None:
        """Drop a created job that could not be set up; none of its hooks is called."""
        job.discard()

    # ---- looking ---------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Job]:
        """The visible jobs, newest first."""
        return iter([job for job in self._jobs if not job.internal])

    def all_jobs(self) -> list[Job]:
        """The visible jobs and the internal ones, newest first."""
        return list(self._jobs)

    def get(self, job_id: str) -> Job | None:
        """The job of this id, or None."""
        return next((job for job in self if job.id == job_id), None)

    def find(self, job_id: str) -> Job:
        """The job of this id; raises `JobNotFound`."""
        job = self.get(job_id)
        if job is None:
            raise JobNotFound
        return job

    def query(self) -> list[dict[str, Any]]:
        """The reply to query-jobs."""
        return [job.info() for job in self]

    # ---- verbs -----------------------------------------------------------------------------------------

    def pause(self, job_id: str) -> None:
        """job-pause."""
        self.find(job_id).user_pause()

    def resume(self, job_id: str) -> None:
        """job-resume."""
        self.find(job_id).user_resume()

    async def cancel(self, job_id: str, *, force: bool = True) -> None:
        """job-cancel; without ``force`` a ready job of a type that can, ends keeping its result."""
        await self.find(job_id).user_cancel(force)

    async def complete(self, job_id: str) -> None:
        """job-complete."""
        await self.find(job_id).user_complete()

    async def finalize(self, job_id: str) -> None:
        """job-finalize: of the whole transaction; returns when it is concluded."""
        await self.find(job_id).user_finalize()

    def dismiss(self, job_id: str) -> None:
        """job-dismiss."""
        self.find(job_id).user_dismiss()

    async def set_speed(self, job_id: str, speed: int) -> None:
        """block-job-set-speed: bytes a second, 0 for no bound."""
        await self.find(job_id).set_option("speed", speed)

    async def set_option(self, job_id: str, name: str, value: object) -> None:
        """job-set-option, block-job-change: ``value`` is plain JSON data."""
        await self.find(job_id).set_option(name, value)

    async def shutdown(self) -> None:
        """Cancel every job by force, wait for its end, and forget it. No job can be created afterwards."""
        self._closing = True
        for job in self.all_jobs():
            await _end(job)

    # ---- for jobs --------------------------------------------------------------------------------------

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Pass on an event."""
        self._events(name, data)

    def forget(self, job: JobCore) -> None:
        """Drop a job that is gone from the list."""
        self._jobs = [other for other in self._jobs if other is not job]

    # ---- ids -------------------------------------------------------------------------------------------

    def _choose_id(self, job: Job, job_id: str | None) -> str:
        if job_id is None:
            return self._default_id(job)
        if not valid_job_id(job_id):
            raise InvalidJobId(f"Invalid job ID '{job_id}'")
        if self.get(job_id) is not None:
            raise InvalidJobId(f"Job ID '{job_id}' already in use")
        return job_id

    def _default_id(self, job: Job) -> str:
        wanted = job.default_id()
        if wanted is None:
            raise InvalidJobId("An explicit job ID is required")
        made = (f"{job.type}-{number}" for number in itertools.count(1))
        return next(self._usable(itertools.chain([wanted], made)))

    def _usable(self, candidates: Iterable[str]) -> Iterator[str]:
        return (text for text in candidates if valid_job_id(text) and self.get(text) is None)


async def _end(job: Job) -> None:
    """Bring ``job`` to null, whatever its status."""
    transaction = job.transaction
    if not job.ended:
        job.cancel(force=True)
        if not job.started:
            await transaction.abort(job)
    elif job.status is JobStatus.PENDING or job.status is JobStatus.WAITING:
        job.cancel(force=True)
        await transaction.abort(job)
    await job.wait_concluded()
    await transaction.settled()
    if job.status is JobStatus.CONCLUDED:
        job.user_dismiss()
