"""Jobs for tests: they do what the test says, and note which of their hooks were called."""

from __future__ import annotations

import asyncio
from typing import Any

from jobs.block.blockjob import BlockJob
from jobs.errors import JobError
from jobs.job import Job
from jobs.manager import JobManager
from jobs.onerror import OnError, Verdict
from jobs.testing import EventRecorder, FakeClock, settle
from jobs.transaction import Transaction


class Actor(Job):
    """A job that works until told to return, a pause point a step; ``fails`` names hooks that raise."""

    type = "actor"

    def __init__(self, *, fails: tuple[str, ...] = (), hang_in: str = "", **flags: Any) -> None:
        super().__init__(**flags)
        self.calls: list[str] = []
        self.steps = 0
        self.outcome: BaseException | None = None
        self.released = False
        self.hold = asyncio.Event()  # a hook named by hang_in waits for it
        self._fails = fails
        self._hang_in = hang_in

    def release(self, outcome: BaseException | None = None) -> None:
        """Let `run` end, by raising ``outcome`` if there is one."""
        self.released, self.outcome = True, outcome
        self.wakeup.ring()

    async def run(self) -> None:
        while not self.released:
            self.steps += 1
            await self.nap()
        if self.outcome is not None:
            raise self.outcome

    async def prepare(self) -> None:
        await self._hook("prepare")

    async def commit(self) -> None:
        await self._hook("commit")

    async def abort(self) -> None:
        await self._hook("abort")

    async def clean(self) -> None:
        await self._hook("clean")

    async def _hook(self, name: str) -> None:
        self.calls.append(name)
        if self._hang_in == name:
            await self.hold.wait()
        if name in self._fails:
            raise JobError(f"{name} failed")


class Mirror(Actor):
    """As an actor, but once released it is ready, and ends when told."""

    type = "mirror"
    completable = True
    soft_cancellable = True

    async def run(self) -> None:
        await super().run()
        self.set_ready()
        self.calls.append((await self.wait_completion_requested()).value)


class BlockActor(Actor, BlockJob):
    """A block job with at most one failing operation."""

    type = "backup"

    def __init__(self, *, failure: int = 0, policy: OnError = OnError.REPORT, **flags: Any) -> None:
        super().__init__(**flags)
        self.failure = failure
        self.policy = policy

    async def run(self) -> None:
        if self.failure:
            failure, self.failure = OSError(self.failure, ""), 0
            if await self.handle_error("write", failure, self.policy) is Verdict.FAIL:
                raise failure
        await super().run()


class BlockMirror(BlockActor, Mirror):
    """A block job that becomes ready."""

    type = "mirror"


class Stage:
    """A manager, its clock and the events, for one test."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.events = EventRecorder()
        self.manager = JobManager(self.events, clock=self.clock)

    def add(
        self, job: Job, job_id: str = "j1", *, transaction: Transaction | None = None, internal: bool = False
    ) -> None:
        """Create ``job``."""
        self.manager.create(job, None if internal else job_id, transaction=transaction, internal=internal)

    def actor(self, job_id: str = "j1", *, transaction: Transaction | None = None, **flags: Any) -> Actor:
        """A created actor."""
        job = Actor(clock=self.clock, **flags)
        self.add(job, job_id, transaction=transaction)
        return job

    def mirror(self, job_id: str = "j1", **flags: Any) -> Mirror:
        """A created job that can be ready."""
        job = Mirror(clock=self.clock, **flags)
        self.add(job, job_id)
        return job

    async def start(self, *jobs: Job) -> None:
        """Start ``jobs`` and let them come to rest."""
        for job in jobs:
            self.manager.start(job)
        await settle()

    async def close(self) -> None:
        """End everything."""
        for job in self.manager.all_jobs():
            if isinstance(job, Actor):
                job.hold.set()
        await self.manager.shutdown()
        assert self.manager.all_jobs() == []
