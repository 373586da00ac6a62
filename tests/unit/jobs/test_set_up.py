"""Setting up: what a cancel meanwhile does, and that a wait loses no wake-up."""

from __future__ import annotations

import asyncio

import pytest

from jobs.errors import JobError
from jobs.testing import settle
from tests.unit.jobs.actors import Actor, Stage
from tests.unit.jobs.loops import both_loops


class SlowStarter(Actor):
    """An actor whose `set_up` waits for `hold`."""

    async def set_up(self) -> None:
        await self._hook("set_up")
        self.calls.append("set up")


def _launch(stage: Stage, job: SlowStarter) -> asyncio.Task[object]:
    return asyncio.create_task(stage.manager.launch(job, "j1"))


@both_loops
async def test_a_cancel_while_a_job_is_set_up_ends_it_afterwards() -> None:
    stage = Stage()
    job = SlowStarter(hang_in="set_up", clock=stage.clock)
    launch = _launch(stage, job)
    await settle()
    cancel = asyncio.create_task(stage.manager.cancel("j1"))
    await settle()
    assert job.calls == ["set_up"]
    job.hold.set()
    with pytest.raises(JobError, match="Job 'j1' was cancelled while it was being set up"):
        await launch
    await cancel
    assert job.calls == ["set_up", "set up", "abort", "clean"]
    assert stage.events.words() == ["created", "aborting", "concluded", "null"]
    assert stage.manager.all_jobs() == []


@both_loops
async def test_a_job_that_is_cancelled_and_then_fails_to_set_up_ends_once() -> None:
    stage = Stage()
    job = SlowStarter(hang_in="set_up", fails=("set_up",), clock=stage.clock)
    launch = _launch(stage, job)
    await settle()
    cancel = asyncio.create_task(stage.manager.cancel("j1"))
    await settle()
    job.hold.set()
    with pytest.raises(JobError, match="set_up failed"):
        await launch
    await cancel
    assert stage.events.words() == ["created", "aborting", "concluded", "null"]
    assert stage.manager.all_jobs() == []


@both_loops
async def test_a_shutdown_waits_for_a_job_that_is_being_set_up() -> None:
    stage = Stage()
    job = SlowStarter(hang_in="set_up", clock=stage.clock)
    launch = _launch(stage, job)
    await settle()
    shutdown = asyncio.create_task(stage.manager.shutdown())
    await settle()
    assert not shutdown.done()
    job.hold.set()
    await shutdown
    with pytest.raises(JobError):
        await launch
    assert job.calls[-1] == "clean"


@both_loops
async def test_a_job_that_is_paused_while_it_is_set_up_starts_paused() -> None:
    stage = Stage()
    job = SlowStarter(hang_in="set_up", clock=stage.clock)
    launch = _launch(stage, job)
    await settle()
    stage.manager.pause("j1")
    job.hold.set()
    await launch
    await settle()
    assert (job.status.value, job.steps) == ("paused", 0)
    await stage.close()


class Listener(Actor):
    """A job that waits for a word."""

    heard = False

    async def run(self) -> None:
        await self.wait_for(lambda: self.heard)
        self.calls.append("heard")


@both_loops
async def test_what_happens_between_look_and_wait_is_not_lost() -> None:
    for rounds in range(6):  # whichever of its first steps the job has come to
        stage = Stage()
        job = Listener(clock=stage.clock)
        stage.add(job)
        stage.manager.start(job)
        for _ in range(rounds):
            await asyncio.sleep(0)
        job.heard = True
        job.wakeup.ring()
        await settle()
        assert "heard" in job.calls, rounds
        await stage.close()
