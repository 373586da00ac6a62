"""Pause, resume, quiesce: counts, statuses, and where a job stops."""

from __future__ import annotations

import asyncio

import pytest

from jobs.errors import JobError
from jobs.testing import settle
from tests.unit.jobs.actors import Actor, Stage
from tests.unit.jobs.loops import both_loops


@both_loops
async def test_a_created_job_counts_one_pause_which_start_takes_away() -> None:
    stage = Stage()
    job = stage.actor()
    assert job.pause_count == 1
    await stage.start(job)
    assert (job.pause_count, job.steps) == (0, 1)
    await stage.close()


@both_loops
async def test_a_job_paused_before_start_does_nothing_until_resumed() -> None:
    stage = Stage()
    job = stage.actor()
    stage.manager.pause("j1")
    await stage.start(job)
    assert (job.status.value, job.steps, job.busy) == ("paused", 0, False)
    stage.manager.resume("j1")
    await settle()
    assert (job.status.value, job.steps) == ("running", 1)
    await stage.close()


@both_loops
async def test_pausing_twice_and_resuming_twice_are_refused() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    with pytest.raises(JobError, match=r"^Can't resume a job that was not paused$"):
        stage.manager.resume("j1")
    stage.manager.pause("j1")
    with pytest.raises(JobError, match=r"^Job is already paused$"):
        stage.manager.pause("j1")
    stage.manager.resume("j1")
    with pytest.raises(JobError, match=r"^Can't resume a job that was not paused$"):
        stage.manager.resume("j1")
    await stage.close()


@both_loops
async def test_pauses_are_counted() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    job.pause()
    stage.manager.pause("j1")
    await settle()
    stage.manager.resume("j1")
    await settle()
    assert job.status.value == "paused"
    job.resume()
    await settle()
    assert job.status.value == "running"
    await stage.close()


@both_loops
async def test_resume_shows_at_once_and_the_reply_follows_the_event() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    stage.manager.pause("j1")
    await settle()
    stage.manager.resume("j1")
    assert job.status.value == "running"
    stage.manager.pause("j1")
    assert job.status.value == "paused"
    await stage.close()


@both_loops
async def test_a_quiesced_job_stands_still_and_shows_nothing() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    stage.events.take()
    async with job.quiesced():
        steps = job.steps
        job.wakeup.ring()
        await stage.clock.advance(10)
        assert (job.steps, job.busy, job.status.value) == (steps, False, "running")
    await settle()
    assert job.steps > steps
    assert stage.events.events == []
    await stage.close()


@both_loops
async def test_quiesce_waits_for_work_that_must_not_be_torn() -> None:
    class Slice(Actor):
        async def run(self) -> None:
            await self.uninterrupted(self.hold.wait())
            await super().run()

    stage = Stage()
    job = Slice(clock=stage.clock)
    stage.add(job)
    await stage.start(job)

    async def quiesce() -> None:
        async with job.quiesced():
            assert job.steps == 1  # up to the first stop

    task = asyncio.create_task(quiesce())
    await settle()
    assert not task.done()
    job.hold.set()
    await task
    await stage.close()


@both_loops
async def test_pause_and_resume_while_quiesced_show_but_do_not_move() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    async with job.quiesced():
        steps = job.steps
        stage.manager.pause("j1")
        assert job.status.value == "paused"
        stage.manager.resume("j1")
        await settle()
        assert (job.status.value, job.steps) == ("running", steps)
    await settle()
    assert job.steps > steps
    await stage.close()


@both_loops
async def test_a_cancel_while_quiesced_waits_for_the_end_of_it() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    async with job.quiesced():
        await stage.manager.cancel("j1")
        await settle()
        assert job.status.value == "running"
    await settle()
    assert job.status.value == "null"


@pytest.mark.parametrize("state", ["created", "concluded"])
@both_loops
async def test_quiescing_a_job_that_is_not_at_work_does_not_wait(state: str) -> None:
    stage = Stage()
    job = stage.actor(auto_dismiss=False)
    if state == "concluded":
        await stage.start(job)
        await stage.manager.cancel("j1")
        await job.wait_concluded()
    async with job.quiesced():
        pass
    await stage.close()


@both_loops
async def test_a_job_that_quiesces_all_jobs_does_not_wait_for_itself() -> None:
    class Selfish(Actor):
        async def run(self) -> None:
            async with self.quiesced():
                await self.pause_point()

    stage = Stage()
    job = Selfish(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    assert job.status.value == "null"


@both_loops
async def test_pause_hooks_frame_the_pause() -> None:
    class Framed(Actor):
        def before_pause(self) -> None:
            self.calls.append(f"before {self.status.value}")

        async def after_pause(self) -> None:
            self.calls.append(f"after {self.status.value}")

    stage = Stage()
    job = Framed(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    stage.manager.pause("j1")
    await settle()
    stage.manager.resume("j1")
    await settle()
    assert job.calls == ["before running", "after running"]
    await stage.close()


@both_loops
async def test_sleep_lasts_its_time_and_stops_for_a_pause() -> None:
    class Sleeper(Actor):
        async def run(self) -> None:
            await self.sleep(10)

    stage = Stage()
    job = Sleeper(clock=stage.clock, auto_dismiss=False)
    stage.add(job)
    await stage.start(job)
    await stage.clock.advance(9)
    assert (job.status.value, job.busy) == ("running", False)
    stage.manager.pause("j1")
    await settle()
    assert job.status.value == "paused"
    stage.manager.resume("j1")
    await stage.clock.advance(1.1)
    assert job.status.value == "concluded"
    await stage.close()


@both_loops
async def test_a_stop_outside_the_jobs_own_task_is_a_defect() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    with pytest.raises(RuntimeError, match="outside the task"):
        await job.pause_point()
    await stage.close()


@both_loops
async def test_a_loop_of_pause_points_lets_others_run() -> None:
    class Loop(Actor):
        async def run(self) -> None:
            while True:
                await self.pause_point()

    stage = Stage()
    job = Loop(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    assert job.busy
    await stage.close()
