"""Jobs that end together: all or none.

Every job is member of one transaction, most of a transaction of one; there is no second path.

Design
    working     members run. One that is done is waiting; when all are, all become pending.
    finalizing  from the moment that all are pending and either none wants a manual finalize or one was
                told to: `prepare` in every member. A failure, or a cancel meanwhile: aborting.
    committing  the point of no return: each member commits, cleans up and concludes.
    aborting    one member failed or was cancelled by force: all others are cancelled by force, and when each
                has ended, it aborts, cleans up and concludes.

    Members are treated newest first. The last three run in one task of the transaction, so that
    no cancel of a job's own task can tear them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from enum import Enum
from typing import TYPE_CHECKING, Any

from jobs.status import JobStatus, Verb

if TYPE_CHECKING:
    from jobs.job import Job

__all__ = ["Phase", "Transaction"]


class Phase(Enum):
    """How far a transaction is; see this module's design."""

    WORKING = "working"
    FINALIZING = "finalizing"
    COMMITTING = "committing"
    ABORTING = "aborting"


class Transaction:
    """The members that end together, newest first. Loop thread only."""

    def __init__(self) -> None:
        self.members: list[Job] = []
        self.phase = Phase.WORKING
        self._task: asyncio.Task[None] | None = None

    def add(self, job: Job) -> None:
        """Take in a job that is being created; raises RuntimeError once the end has begun."""
        if self.phase is not Phase.WORKING:
            raise RuntimeError(f"a job cannot join a transaction that is {self.phase.value}")
        self.members.insert(0, job)

    def remove(self, job: Job) -> None:
        """Let go of a job that is over; without effect if it is not a member."""
        if job in self.members:
            self.members.remove(job)

    def too_late_for(self, verb: Verb) -> bool:
        """Whether the end is too far on for ``verb``, though the members' status still accepts it."""
        if verb is Verb.CANCEL:
            return self.phase is Phase.COMMITTING
        return verb is Verb.FINALIZE and self.phase is not Phase.WORKING

    def member_ended(self, job: Job) -> None:
        """The run of ``job`` is over, with whatever result."""
        if job.failed:
            job.enter_aborting()
            self._begin_abort(job)
            return
        job.enter_waiting()
        if all(member.ended for member in self.members):
            self._all_ended()

    async def finalize(self) -> None:
        """Conclude all members, which are pending; returns when they are."""
        self._begin_finalize()
        await self.settled()

    async def abort(self, job: Job) -> None:
        """Cancel the rest because ``job``, not at work, was cancelled by force; returns when all is over."""
        self._begin_abort(job)
        await self.settled()

    async def settled(self) -> None:
        """Return when the end that has begun, if any, is over. A cancel of the caller does not stop it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    def _all_ended(self) -> None:
        for member in list(self.members):
            member.enter_pending()
        if all(member.auto_finalize for member in self.members):
            self._begin_finalize()

    def _begin_finalize(self) -> None:
        self.phase = Phase.FINALIZING
        self._spawn(self._finalize())

    def _begin_abort(self, first: Job) -> None:
        if self.phase is Phase.WORKING:
            self.phase = Phase.ABORTING
            self._cancel_others(first)
            self._spawn(self._conclude_all())
        # finalizing: the task looks for cancelled members when all are prepared; aborting: it is on its way

    async def _finalize(self) -> None:
        for member in list(self.members):
            if member.force_cancelled or not await member.call_prepare():
                break
        first = next((member for member in self.members if member.failed), None)
        if first is None:
            self.phase = Phase.COMMITTING
        else:
            self.phase = Phase.ABORTING
            first.enter_aborting()
            self._cancel_others(first)
        await self._conclude_all()

    async def _conclude_all(self) -> None:
        while self.members:
            member = self.members[0]
            await member.wait_run_over()
            await member.conclude()

    def _cancel_others(self, first: Job) -> None:
        for member in list(self.members):
            if member is not first and member.status is not JobStatus.ABORTING:
                member.cancel(force=True)

    def _spawn(self, end: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(end, name="end of a job transaction")
