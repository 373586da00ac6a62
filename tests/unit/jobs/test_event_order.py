"""Our jobs send their events in the order written down in tests/jobs/event_orders.py."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.block.legacy import BlockJobNames, cancel_block_job
from jobs.job import Job
from jobs.onerror import OnError
from jobs.testing import settle
from jobs.transaction import Transaction
from tests.jobs.event_orders import ORDERS, Order, Subject
from tests.unit.jobs.actors import Actor, BlockActor, BlockMirror, Stage
from tests.unit.jobs.loops import both_loops


class Create(Actor):
    """A job that is no block job."""

    type = "create"


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@both_loops
async def test_events_come_in_the_order_of_the_script(order: Order) -> None:
    stage = Stage()
    transaction = Transaction()
    jobs = [_make(stage, subject) for subject in order.subjects]
    for job, subject in zip(jobs, order.subjects, strict=True):
        stage.add(job, subject.id, transaction=transaction)
    if order.abort_start:
        await stage.manager.cancel(order.subjects[0].id)
    else:
        await stage.start(*jobs)
    for subject, job in zip(order.subjects, jobs, strict=True):
        await _work(stage, subject, job)
    for index, line in enumerate(order.script):
        if line.startswith(">"):
            await _command(stage, line)
        else:
            expected = order.events(index + 1)
            assert stage.events.words(ids=len(jobs) > 1)[: len(expected)] == expected
    assert stage.events.words(ids=len(jobs) > 1) == order.events()
    await stage.close()


def _make(stage: Stage, subject: Subject) -> Actor:
    flags: dict[str, Any] = {
        "clock": stage.clock,
        "auto_finalize": subject.auto_finalize,
        "auto_dismiss": subject.auto_dismiss,
        "fails": ("prepare",) if subject.prepare_error else (),
    }
    if subject.kind == "create":
        return Create(**flags)
    block_type = BlockMirror if subject.kind == "mirror" else BlockActor
    return block_type(failure=subject.error, policy=OnError(subject.on_error), **flags)


async def _work(stage: Stage, subject: Subject, job: Actor) -> None:
    """Let the job do what it does by itself."""
    await stage.clock.advance(1)  # past the retry of an ignored error
    if not subject.endless:
        job.release(OSError(subject.error, "") if subject.kind == "create" and subject.error else None)
    await settle()


async def _command(stage: Stage, line: str) -> None:
    verb, _, job_id = line[1:].partition(" ")
    manager = stage.manager
    if verb == "block-job-cancel":
        await cancel_block_job(BlockJobNames(manager).find(job_id))
    elif verb in ("job-pause", "job-resume", "job-dismiss"):
        getattr(manager, verb.removeprefix("job-"))(job_id)
    else:
        await getattr(manager, verb.removeprefix("job-"))(job_id)
    await settle()


@both_loops
async def test_generic_events_follow_those_of_the_subsystem() -> None:
    stage = Stage()
    mirror = BlockMirror(clock=stage.clock, failure=5, policy=OnError.STOP)
    stage.add(mirror)
    await stage.start(mirror)
    stage.manager.resume("j1")
    mirror.release()
    await settle()
    await stage.manager.complete("j1")
    await settle()
    assert stage.events.words(generic=True) == [
        "created",
        "running",
        "JOB_STARTED",
        "BLOCK_JOB_ERROR:stop",
        "JOB_ERROR:stop:error",
        "paused",
        "running",
        "ready",
        "BLOCK_JOB_READY",
        "JOB_READY",
        "waiting",
        "pending",
        "BLOCK_JOB_COMPLETED",
        "JOB_COMPLETED",
        "concluded",
        "null",
    ]


@both_loops
async def test_block_job_events_carry_the_members_that_clients_know() -> None:
    stage = Stage()
    job = BlockActor(clock=stage.clock, device="sda", speed=7, failure=5, auto_finalize=False)
    job.progress.total, job.progress.current = 100, 40
    stage.add(job)
    await stage.start(job)
    progress = {"type": "backup", "device": "j1", "len": 100, "offset": 40, "speed": 7}
    assert stage.events.of("BLOCK_JOB_ERROR") == [{"device": "j1", "operation": "write", "action": "report"}]
    assert stage.events.of("BLOCK_JOB_COMPLETED") == [{**progress, "error": "Input/output error"}]
    assert stage.events.of("JOB_COMPLETED") == [
        {
            "id": "j1",
            "type": "backup",
            "current-progress": 40,
            "total-progress": 100,
            "success": False,
            "error": "Input/output error",
        }
    ]


@both_loops
async def test_generic_success_is_told_from_failure() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    job.release()
    await settle()
    assert [data["success"] for data in stage.events.of("JOB_COMPLETED")] == [True]


@both_loops
async def test_pending_names_type_and_id() -> None:
    stage = Stage()
    job = BlockActor(clock=stage.clock, auto_finalize=False)
    stage.add(job, "b")
    await stage.start(job)
    job.release()
    await settle()
    assert stage.events.of("BLOCK_JOB_PENDING") == [{"type": "backup", "id": "b"}]
    await stage.close()


@both_loops
async def test_internal_jobs_send_nothing_and_are_in_no_list() -> None:
    stage = Stage()
    job: Job = BlockActor(clock=stage.clock)
    stage.add(job, internal=True)
    await stage.start(job)
    assert stage.manager.query() == []
    assert stage.manager.all_jobs() == [job]
    await stage.close()
    assert stage.events.events == []
