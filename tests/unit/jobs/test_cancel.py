"""Cancel, soft and forced, in each status; completion; hooks at the end."""

from __future__ import annotations

import asyncio
import logging

import pytest

from jobs.errors import JobError
from jobs.job import Job
from jobs.testing import settle
from tests.unit.jobs.actors import Actor, Stage
from tests.unit.jobs.loops import both_loops


async def _bring_to(stage: Stage, status: str) -> Actor:
    job = stage.mirror(auto_finalize=False, auto_dismiss=False)
    if status == "created":
        return job
    await stage.start(job)
    if status not in ("running", "paused"):
        job.release()
        await settle()
    if status in ("paused", "standby"):
        stage.manager.pause("j1")
    if status in ("pending", "concluded"):
        await stage.manager.complete("j1")
        await settle()
    if status == "concluded":
        await stage.manager.finalize("j1")
    await settle()
    assert job.status.value == status
    return job


@pytest.mark.parametrize("status", ["created", "running", "paused", "ready", "standby", "pending"])
@both_loops
async def test_a_forced_cancel_aborts_in_every_status(status: str) -> None:
    stage = Stage()
    job = await _bring_to(stage, status)
    await stage.manager.cancel("j1")
    await settle()
    assert job.status.value == ("null" if status == "created" else "concluded")
    assert job.error == "Operation canceled"
    assert job.calls[-2:] == ["abort", "clean"]
    assert "commit" not in job.calls
    assert ("JOB_CANCELLED" in dict(stage.events.events)) == (status != "created")
    await stage.close()


@both_loops
async def test_a_waiting_job_is_cancelled_with_its_group() -> None:
    stage = Stage()
    first = stage.actor("a")
    second = stage.actor("b", transaction=first.transaction)
    await stage.start(first, second)
    first.release()
    await settle()
    assert first.status.value == "waiting"
    await stage.manager.cancel("a")
    assert (first.status.value, second.status.value) == ("null", "null")


@both_loops
async def test_a_concluded_job_refuses_to_be_cancelled() -> None:
    stage = Stage()
    await _bring_to(stage, "concluded")
    with pytest.raises(JobError, match="in state 'concluded' cannot accept command verb 'cancel'"):
        await stage.manager.cancel("j1")
    await stage.close()


@both_loops
async def test_a_soft_cancel_of_a_ready_job_keeps_its_result() -> None:
    stage = Stage()
    job = await _bring_to(stage, "ready")
    await stage.manager.cancel("j1", force=False)
    await settle()
    assert (job.status.value, job.calls) == ("pending", ["soft-cancel"])
    with pytest.raises(JobError):
        await stage.manager.complete("j1")
    await stage.manager.finalize("j1")
    assert job.calls == ["soft-cancel", "prepare", "commit", "clean"]
    await stage.close()


@both_loops
async def test_after_a_soft_cancel_complete_is_refused() -> None:
    stage = Stage()
    job = await _bring_to(stage, "ready")
    job.cancel(force=False)
    with pytest.raises(JobError, match=r"^The active block job 'j1' cannot be completed$"):
        await job.user_complete()
    await settle()
    await stage.close()


@pytest.mark.parametrize("status", ["created", "running", "pending"])
@both_loops
async def test_a_soft_cancel_elsewhere_is_forced(status: str) -> None:
    stage = Stage()
    job = await _bring_to(stage, status)
    await stage.manager.cancel("j1", force=False)
    await settle()
    assert job.force_cancelled
    await stage.close()


@both_loops
async def test_complete_is_refused_for_types_without_it() -> None:
    class Odd(Actor):
        async def run(self) -> None:
            self.set_ready()
            await super().run()

    stage = Stage()
    job = Odd(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    with pytest.raises(JobError, match=r"^The active block job 'j1' cannot be completed$"):
        await stage.manager.complete("j1")
    await stage.close()


@both_loops
async def test_a_refused_complete_leaves_the_job_ready() -> None:
    stage = Stage()
    job = await _bring_to(stage, "ready")

    async def refuse() -> None:
        raise JobError("the target is gone")

    job.on_complete = refuse  # type: ignore[method-assign]
    with pytest.raises(JobError, match="the target is gone"):
        await stage.manager.complete("j1")
    await settle()
    assert (job.status.value, job.completion) == ("ready", None)
    await stage.close()


@both_loops
async def test_work_that_must_not_be_torn_ends_before_the_cancel() -> None:
    class Slice(Actor):
        async def run(self) -> None:
            await self.uninterrupted(self._slice())
            self.calls.append("never reached")

        async def _slice(self) -> None:
            await self.hold.wait()
            self.calls.append("slice done")

        def on_cancel(self, force: bool) -> None:
            self.calls.append(f"hurry {force}")

    stage = Stage()
    job = Slice(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    await stage.manager.cancel("j1")
    await settle()
    assert (job.status.value, job.calls) == ("running", ["hurry True"])
    job.hold.set()
    await settle()
    assert job.calls == ["hurry True", "slice done", "abort", "clean"]


@both_loops
async def test_a_job_that_swallows_the_cancel_meets_it_again() -> None:
    class Stubborn(Actor):
        async def run(self) -> None:
            try:
                await super().run()
            except asyncio.CancelledError:
                self.calls.append("swallowed")
            await self.pause_point()
            self.calls.append("never reached")

    stage = Stage()
    job = Stubborn(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    await stage.manager.cancel("j1")
    await settle()
    assert job.calls == ["swallowed", "abort", "clean"]


@both_loops
async def test_a_cancel_before_the_first_step_is_a_cancel() -> None:
    stage = Stage()
    job = stage.actor()
    stage.manager.start(job)
    await stage.manager.cancel("j1")
    await settle()
    assert (job.steps, stage.events.words()) == (0, ["created", "running", "aborting", "concluded", "null"])


@both_loops
async def test_once_committing_cancel_and_finalize_are_too_late() -> None:
    stage = Stage()
    job = stage.actor(auto_finalize=False, hang_in="commit")
    await stage.start(job)
    job.release()
    await settle()
    finalizing = asyncio.create_task(stage.manager.finalize("j1"))
    await settle()
    with pytest.raises(JobError, match="in state 'pending' cannot accept command verb 'cancel'"):
        await stage.manager.cancel("j1")
    with pytest.raises(JobError, match="in state 'pending' cannot accept command verb 'finalize'"):
        await stage.manager.finalize("j1")
    job.cancel(force=True)
    job.hold.set()
    await finalizing
    assert job.calls == ["prepare", "commit", "clean"]
    assert stage.events.of("JOB_COMPLETED")[0]["success"]


@both_loops
async def test_a_cancel_during_prepare_aborts() -> None:
    stage = Stage()
    job = stage.actor(hang_in="prepare")
    await stage.start(job)
    job.release()
    await settle()
    cancelling = asyncio.create_task(stage.manager.cancel("j1"))
    await settle()
    job.hold.set()
    await cancelling
    assert job.calls == ["prepare", "abort", "clean"]
    assert stage.events.of("JOB_CANCELLED")


@pytest.mark.parametrize(
    ("fails", "calls", "error"),
    [
        (("prepare",), ["prepare", "abort", "clean"], "prepare failed"),
        (("prepare", "abort"), ["prepare", "abort", "clean"], "prepare failed"),
        (("prepare", "clean"), ["prepare", "abort", "clean"], "prepare failed"),
        (("commit",), ["prepare", "commit", "clean"], "commit failed"),
        (("clean",), ["prepare", "commit", "clean"], "clean failed"),
    ],
)
@both_loops
async def test_hooks_that_fail_still_bring_the_job_to_its_end(
    fails: tuple[str, ...], calls: list[str], error: str
) -> None:
    stage = Stage()
    job = stage.actor(fails=fails, auto_dismiss=False)
    await stage.start(job)
    job.release()
    await settle()
    assert (job.calls, job.error, job.status.value) == (calls, error, "concluded")
    assert stage.manager.query()[0]["error"] == error
    await stage.close()


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (OSError(28, "whatever"), "whatever"),
        (
            JobError("Source and target image have different sizes"),
            "Source and target image have different sizes",
        ),
        (ZeroDivisionError("oops"), "ZeroDivisionError: oops"),
    ],
)
@both_loops
async def test_the_error_is_the_text_of_the_failure(failure: Exception, text: str) -> None:
    stage = Stage()
    job = stage.actor(auto_dismiss=False)
    await stage.start(job)
    job.release(failure)
    await settle()
    assert job.error == text
    await stage.close()


@both_loops
async def test_a_defect_in_a_job_type_is_logged_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    with caplog.at_level(logging.ERROR, "jobs"):
        job.release(ZeroDivisionError("oops"))
        await settle()
    assert "ZeroDivisionError: oops" in caplog.text


@both_loops
async def test_a_hint_that_fails_does_not_spoil_the_cancel() -> None:
    class Broken(Actor):
        def on_cancel(self, force: bool) -> None:
            raise ValueError(force)

    stage = Stage()
    job: Job = Broken(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    await stage.manager.cancel("j1")
    await settle()
    assert job.status.value == "null"


@both_loops
async def test_a_job_paused_by_the_server_runs_again_before_it_aborts() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    job.pause()
    await settle()
    await stage.manager.cancel("j1")
    await settle()
    expected = ["created", "running", "paused", "running", "aborting", "concluded", "null"]
    assert stage.events.words() == expected
