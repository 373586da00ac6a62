"""The rate limit: exact in the long run, at once when changed, never a sleep that cannot be woken."""

from __future__ import annotations

import asyncio

import pytest

from jobs.ratelimit import SLICE, RateLimit
from jobs.testing import FakeClock, settle
from tests.unit.jobs.actors import Stage
from tests.unit.jobs.loops import both_loops
from tests.unit.jobs.test_options import Copy


async def _consume(limit: RateLimit, size: int, done: list[int]) -> None:
    while True:
        await limit.wait(size)
        done.append(size)
        await asyncio.sleep(0)


async def _rate(speed: int, size: int, seconds: float) -> float:
    clock = FakeClock()
    limit = RateLimit(clock, speed)
    done: list[int] = []
    task = asyncio.create_task(_consume(limit, size, done))
    await clock.advance(seconds)
    task.cancel()
    await settle()
    return sum(done) / seconds


@pytest.mark.parametrize(("speed", "size"), [(1_000_000, 10_000), (1_000_000, 65_536), (100_000, 1_000_000)])
@both_loops
async def test_the_rate_is_the_speed_in_the_long_run(speed: int, size: int) -> None:
    seconds = 20.0 * size / speed if size > speed / 10 else 3.0
    done = await _rate(speed, size, seconds) * seconds
    assert -size <= done - speed * seconds <= speed * SLICE + size


@both_loops
async def test_a_burst_is_at_most_a_slice_and_one_request() -> None:
    clock = FakeClock()
    limit = RateLimit(clock, 1000)
    done: list[int] = []
    task = asyncio.create_task(_consume(limit, 30, done))
    await settle()
    assert 100 <= sum(done) < 130
    task.cancel()
    await settle()


@both_loops
async def test_no_speed_is_no_limit() -> None:
    limit = RateLimit(FakeClock())
    for _ in range(1000):
        await limit.wait(1 << 40)


@both_loops
async def test_a_higher_speed_ends_a_long_wait_at_once() -> None:
    clock = FakeClock()
    limit = RateLimit(clock, 1)
    await limit.wait(1 << 30)
    waiter = asyncio.create_task(limit.wait(1))
    await settle()
    assert not waiter.done()
    limit.speed = 0
    await settle()
    assert waiter.done()


@both_loops
async def test_a_lower_speed_does_not_inherit_the_debt_of_a_higher() -> None:
    clock = FakeClock()
    limit = RateLimit(clock, 1 << 30)
    await limit.wait(1 << 30)
    limit.speed = 10
    assert limit.delay() <= 0.2


def test_a_request_is_cut_to_a_slice() -> None:
    limit = RateLimit(FakeClock(), 10_000_000)
    assert limit.budget(64 << 20, 65536) == 1_000_000
    limit.speed = 1000
    assert limit.budget(64 << 20, 65536) == 65536
    limit.speed = 0
    assert limit.budget(64 << 20, 65536) == 64 << 20


def test_negative_speed_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        RateLimit(FakeClock(), -1)


@both_loops
async def test_speed_of_a_job_changes_through_its_option() -> None:
    stage = Stage()
    job = Copy(clock=stage.clock, speed=1)
    stage.add(job)
    await stage.start(job)
    copied = job.copied
    await stage.clock.advance(1)
    assert job.copied == copied
    assert job.info()["stall"] == "held to 1 bytes/s"
    assert not job.busy
    await stage.manager.set_speed("j1", 1 << 30)
    await stage.clock.advance(0.5)
    assert job.copied > copied + 20
    await stage.close()


@both_loops
async def test_pause_and_cancel_reach_a_throttled_job() -> None:
    stage = Stage()
    job = Copy(clock=stage.clock, speed=1)
    stage.add(job)
    await stage.start(job)
    stage.manager.pause("j1")
    await settle()
    assert job.status.value == "paused"
    await stage.manager.cancel("j1")
    await settle()
    assert job.status.value == "null"
