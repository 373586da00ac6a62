"""Whatever users do, in whatever order: jobs keep to the tables, never hang, and can be ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jobs.errors import JobError
from jobs.testing import settle
from jobs.transaction import Phase, Transaction
from tests.unit.jobs.actors import BlockMirror, Stage
from tests.unit.jobs.loops import LOOPS
from tests.unit.jobs.test_status import ALLOWED

IDS = st.sampled_from(["a", "b", "c"])
VERBS = st.sampled_from(["pause", "resume", "cancel", "complete", "finalize", "dismiss"])


class JobMachine(RuleBasedStateMachine):
    """Creates jobs, alone and in groups, and throws verbs at them."""

    loop_kind = "asyncio-debug"

    def __init__(self) -> None:
        super().__init__()
        self.complaints: list[dict[str, Any]] = []
        self.loop = LOOPS[self.loop_kind]()
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.stage = Stage()
        self.group = Transaction()
        self.statuses: dict[str, str] = {}

    def do(self, body: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(body, 10)
            await settle()

        self.loop.run_until_complete(bounded())

    @rule(
        job_id=IDS,
        flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
        fails=st.sampled_from([(), (), ("prepare",), ("commit",), ("abort", "clean")]),
    )
    def create(self, job_id: str, flags: tuple[bool, bool, bool, bool], fails: tuple[str, ...]) -> None:
        finalize, dismiss, grouped, started = flags
        job = BlockMirror(clock=self.stage.clock, auto_finalize=finalize, auto_dismiss=dismiss, fails=fails)
        if self.group.phase is not Phase.WORKING:
            self.group = Transaction()

        async def body() -> None:
            try:
                self.stage.add(job, job_id, transaction=self.group if grouped else None)
            except JobError:
                return
            if started:
                await self.stage.start(job)

        self.do(body())

    @rule(job_id=IDS, verb=VERBS)
    def verb(self, job_id: str, verb: str) -> None:
        async def body() -> None:
            try:
                result = getattr(self.stage.manager, verb)(job_id)
                if asyncio.iscoroutine(result):
                    # Waits for the rest of a group only where nothing keeps that rest from ending.
                    await result
            except JobError:
                pass

        self.do(body())

    @rule(job_id=IDS, force=st.booleans())
    def block_cancel(self, job_id: str, force: bool) -> None:
        async def body() -> None:
            job = self.stage.manager.get(job_id)
            if job is not None and not job.ended:
                await job.user_cancel(force)

        self.do(body())

    @rule(job_id=IDS, failing=st.booleans())
    def release(self, job_id: str, failing: bool) -> None:
        async def body() -> None:
            job = self.stage.manager.get(job_id)
            if isinstance(job, BlockMirror):
                job.release(OSError(5, "") if failing else None)

        self.do(body())

    @rule(job_id=IDS)
    def start(self, job_id: str) -> None:
        async def body() -> None:
            job = self.stage.manager.get(job_id)
            if job is not None and job.status.value == "created":
                await self.stage.start(job)

        self.do(body())

    @rule(job_id=IDS)
    def quiesce(self, job_id: str) -> None:
        async def body() -> None:
            job = self.stage.manager.get(job_id)
            if job is not None:
                async with job.quiesced():
                    await settle()

        self.do(body())

    @invariant()
    def events_keep_to_the_table(self) -> None:
        for name, data in self.stage.events.take():
            if name == "JOB_STATUS_CHANGE":
                old = self.statuses.get(data["id"], "undefined")
                assert data["status"] in ALLOWED["undefined" if old == "null" else old].split()
                self.statuses[data["id"]] = data["status"]

    @invariant()
    def nothing_went_wrong_unseen(self) -> None:
        assert not self.complaints

    def teardown(self) -> None:
        self.do(self.stage.close())
        self.events_keep_to_the_table()
        assert set(self.statuses.values()) <= {"null"}
        assert not asyncio.all_tasks(self.loop)
        self.nothing_went_wrong_unseen()
        self.loop.close()


class UvloopJobMachine(JobMachine):
    """The same on uvloop."""

    loop_kind = "uvloop"


TestJobs = JobMachine.TestCase
TestJobs.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestJobsOnUvloop = UvloopJobMachine.TestCase
TestJobsOnUvloop.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
