"""The copy loop against a copier of the test's own: speed, errors, progress, checks."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any, cast

import pytest

from jobs.block.blockjob import BlockJob
from jobs.block.copyloop import SLICE_BYTES, CopyLoop, ErrorPolicies
from jobs.errors import JobError
from jobs.onerror import OnError
from jobs.testing import settle
from nbd_backend.block.events import EventRing
from nbd_backend.block.kernel import Copier, Event, EventKind, Side
from tests.unit.jobs.actors import Stage
from tests.unit.jobs.loops import both_loops

KIB, MIB = 1 << 10, 1 << 20
REPORT = ErrorPolicies()


class Disk:
    """Stands for copier and ring: a disk of `remaining` bytes, of which `holes` need not be read."""

    def __init__(
        self, remaining: int, *, holes: int = 0, failures: tuple[tuple[int, Side], ...] = ()
    ) -> None:
        self.remaining = remaining
        self.holes = holes
        self.failures = list(failures)
        self.asked: list[tuple[int, bool]] = []

    def start_slice(self, max_bytes: int, max_ms: int, store_only: bool, token: int) -> None:
        self.asked.append((max_bytes, store_only))

    def event(self, start: Callable[[int], None]) -> asyncio.Future[Event]:
        start(1)
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        future.set_result(self._slice())
        return future

    def _slice(self) -> Event:
        if self.failures:
            number, side = self.failures.pop(0)
            return Event(EventKind.SLICE, number, 1, 0, 4096, side)
        skipped, self.holes = min(self.holes, self.remaining), 0
        moved = min(self.asked[-1][0], self.remaining - skipped)
        self.remaining -= skipped + moved
        return Event(EventKind.SLICE, 0, 1, skipped + moved, moved, 0)


class Copying(BlockJob):
    """A job that copies a `Disk`."""

    type = "copying"

    def __init__(self, disk: Disk, policies: ErrorPolicies = REPORT, **flags: Any) -> None:
        super().__init__(**flags)
        self.broken: JobError | None = None
        ring, copier = cast("EventRing", disk), cast("Copier", disk)
        self.loop = CopyLoop(self, ring, copier, policies, self._check)
        self.progress.set_remaining(disk.remaining)

    def _check(self) -> None:
        if self.broken:
            raise self.broken

    async def run(self) -> None:
        await self.loop.copy_all()


def _started(stage: Stage, job: Copying) -> Copying:
    stage.add(job)
    stage.manager.start(job)
    return job


@both_loops
async def test_it_copies_in_large_slices_until_nothing_is_left() -> None:
    stage, disk = Stage(), Disk(100 * MIB)
    job = _started(stage, Copying(disk, clock=stage.clock))
    await job.wait_concluded()
    assert disk.asked == [(SLICE_BYTES, False)] * 2
    assert (job.progress.current, job.progress.total) == (100 * MIB, 100 * MIB)
    assert job.error is None


@both_loops
async def test_a_limit_holds_for_what_was_read() -> None:
    stage, disk = Stage(), Disk(MIB)
    job = _started(stage, Copying(disk, speed=1000 * KIB, clock=stage.clock))
    await stage.clock.advance(0.5)
    assert disk.asked[0] == (100 * KIB, False)
    assert job.progress.current <= (500 + 2 * 100) * KIB
    await stage.clock.advance(1)
    assert disk.remaining == 0


@both_loops
async def test_holes_are_not_charged() -> None:
    stage, disk = Stage(), Disk(1 << 40, holes=(1 << 40) - 64 * KIB)
    job = _started(stage, Copying(disk, speed=MIB, clock=stage.clock))
    await stage.clock.advance(1)
    assert disk.remaining == 0
    await job.wait_concluded()


@pytest.mark.parametrize(("side", "operation"), [(Side.SOURCE, "read"), (Side.TARGET, "write")])
@both_loops
async def test_an_error_ends_the_job_unless_the_policy_of_its_side_says_otherwise(
    side: Side, operation: str
) -> None:
    for policy, error in ((OnError.REPORT, "Input/output error"), (OnError.IGNORE, None)):
        stage, disk = Stage(), Disk(MIB, failures=((errno.EIO, side),))
        policies = ErrorPolicies(**{"source" if side is Side.SOURCE else "target": policy})
        job = _started(stage, Copying(disk, policies, clock=stage.clock))
        await stage.clock.advance(1)
        assert job.error == error
        assert stage.events.of("BLOCK_JOB_ERROR")[0]["operation"] == operation


@both_loops
async def test_a_task_is_tried_again_by_the_policy_of_its_side() -> None:
    class WritingBack(Copying):
        async def run(self) -> None:
            await self.loop.task(Side.TARGET, lambda token: disk.start_slice(0, 0, False, token))

    stage, disk = Stage(), Disk(MIB, failures=((errno.ENOSPC, Side.TARGET),))
    job = WritingBack(disk, ErrorPolicies(target=OnError.ENOSPC), clock=stage.clock)
    stage.add(job)
    stage.manager.start(job)
    await settle()
    assert job.status.value == "paused"
    stage.manager.resume("j1")
    await job.wait_concluded()
    assert (job.error, len(disk.asked)) == (None, 2)


@both_loops
async def test_an_error_of_the_store_always_ends_the_job() -> None:
    stage, disk = Stage(), Disk(MIB, failures=((errno.EIO, Side.STORE),))
    policies = ErrorPolicies(OnError.IGNORE, OnError.IGNORE)
    job = _started(stage, Copying(disk, policies, clock=stage.clock))
    await settle()
    assert job.error == "The local store of old data failed at offset 4096: Input/output error"
    assert stage.events.of("BLOCK_JOB_ERROR") == []


@both_loops
async def test_what_breaks_while_it_waits_for_its_limit_ends_the_job() -> None:
    stage, disk = Stage(), Disk(MIB)
    job = _started(stage, Copying(disk, speed=1, clock=stage.clock))
    await settle()
    job.broken = JobError("broken")
    job.wakeup.ring()
    await stage.clock.advance(1 << 21)
    assert job.error == "broken"


@both_loops
async def test_progress_never_goes_back() -> None:
    stage, disk = Stage(), Disk(MIB)
    job = _started(stage, Copying(disk, clock=stage.clock))
    await job.wait_concluded()
    disk.remaining = MIB
    job.loop.show_progress()
    assert job.progress.current == MIB
