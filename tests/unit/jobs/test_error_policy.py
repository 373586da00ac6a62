"""Error policies: what a job does about a failing operation."""

from __future__ import annotations

import errno
import itertools

import pytest

from jobs.onerror import ErrorAction, OnError, Verdict, choose_action
from jobs.testing import settle
from tests.unit.jobs.actors import Actor, BlockActor, Stage
from tests.unit.jobs.loops import both_loops

EIO, ENOSPC = errno.EIO, errno.ENOSPC
CHOICES = {
    (OnError.REPORT, EIO): "report",
    (OnError.REPORT, ENOSPC): "report",
    (OnError.IGNORE, EIO): "ignore",
    (OnError.IGNORE, ENOSPC): "ignore",
    (OnError.ENOSPC, EIO): "report",
    (OnError.ENOSPC, ENOSPC): "stop",
    (OnError.STOP, EIO): "stop",
    (OnError.STOP, ENOSPC): "stop",
    (OnError.AUTO, EIO): "report",
    (OnError.AUTO, ENOSPC): "stop",
}


@pytest.mark.parametrize(("policy", "code"), list(itertools.product(OnError, [EIO, ENOSPC])))
def test_the_action_for_each_policy_and_error(policy: OnError, code: int) -> None:
    assert choose_action(policy, OSError(code, "")) is ErrorAction(CHOICES[policy, code])


@pytest.mark.parametrize(("code", "io_status"), [(EIO, "failed"), (ENOSPC, "nospace")])
@both_loops
async def test_stop_shows_in_io_status_until_resume(code: int, io_status: str) -> None:
    stage = Stage()
    job = BlockActor(clock=stage.clock, failure=code, policy=OnError.STOP)
    stage.add(job)
    await stage.start(job)
    info = job.block_info()
    assert (info["io-status"], info["paused"], info["busy"], info["status"]) == (
        io_status,
        True,
        False,
        "paused",
    )
    assert job.info()["stall"] == f"stopped by an error ({io_status})"
    stage.manager.resume("j1")
    await settle()
    info = job.block_info()
    assert (info["io-status"], info["paused"], info["status"]) == ("ok", False, "running")
    await stage.close()


class Failing(Actor):
    """Meets an ignored error at every step."""

    operation = "write"

    async def run(self) -> None:
        while not self.released:
            self.steps += 1
            failure = OSError(EIO, f"error {self.steps}")
            assert await self.handle_error(self.operation, failure, OnError.IGNORE) is Verdict.RETRY


@both_loops
async def test_ignored_errors_are_told_once_a_second_and_the_last_wins() -> None:
    stage = Stage()
    job = Failing(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    await stage.clock.advance(0.99)
    assert [data["error"] for data in stage.events.of("JOB_ERROR")] == ["error 1"]
    steps = job.steps
    await stage.clock.advance(0.02)
    assert [data["error"] for data in stage.events.of("JOB_ERROR")] == ["error 1", f"error {steps}"]
    await stage.clock.advance(60)
    assert 30 <= len(stage.events.of("JOB_ERROR")) <= 63
    await stage.close()


@both_loops
async def test_retries_of_ignored_errors_slow_down() -> None:
    stage = Stage()
    job = Failing(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    await stage.clock.advance(100)
    assert 90 <= job.steps <= 120
    await stage.close()


@both_loops
async def test_what_was_held_back_is_told_before_the_end() -> None:
    stage = Stage()
    job = Failing(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    await stage.clock.advance(0.2)
    steps = job.steps
    await stage.manager.cancel("j1")
    await settle()
    assert [data["error"] for data in stage.events.of("JOB_ERROR")][-1] == f"error {steps}"
    names = [name for name, _ in stage.events.events]
    last = len(names) - 1 - names[::-1].index("JOB_ERROR")
    assert names[last + 1 :] == [
        "JOB_STATUS_CHANGE",
        "JOB_CANCELLED",
        "JOB_STATUS_CHANGE",
        "JOB_STATUS_CHANGE",
    ]


@both_loops
async def test_a_stop_does_not_pause_twice_what_the_user_has_paused() -> None:
    stage = Stage()
    job = BlockActor(clock=stage.clock, failure=EIO, policy=OnError.STOP)
    stage.add(job)
    stage.manager.pause("j1")
    await stage.start(job)
    job.user_resume()
    await settle()
    assert (job.pause_count, job.status.value) == (1, "paused")
    stage.manager.resume("j1")
    await settle()
    assert job.status.value == "running"
    await stage.close()
