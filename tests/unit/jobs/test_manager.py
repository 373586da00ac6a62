"""Ids, lists, queries, shutdown, and how older clients find a block job."""

from __future__ import annotations

import re

import pytest

from jobs.block.legacy import BlockJobNames, cancel_block_job
from jobs.errors import InvalidJobId, JobError, JobNotFound
from jobs.testing import settle
from tests.unit.jobs.actors import Actor, BlockActor, Stage
from tests.unit.jobs.loops import both_loops


@pytest.mark.parametrize("bad", ["", "1a", "-a", "a b", "ä", "a/b", "#block1", "a\n"])
@both_loops
async def test_malformed_ids_are_refused(bad: str) -> None:
    stage = Stage()
    with pytest.raises(InvalidJobId, match="^" + re.escape(f"Invalid job ID '{bad}'") + r"\Z"):
        stage.actor(bad)
    assert stage.manager.all_jobs() == []


@pytest.mark.parametrize("good", ["a", "Z9", "a-b.c_d"])
@both_loops
async def test_well_formed_ids_are_taken(good: str) -> None:
    stage = Stage()
    stage.actor(good)
    assert stage.manager.query()[0]["id"] == good
    await stage.close()


@both_loops
async def test_ids_are_unique_until_the_job_is_gone() -> None:
    stage = Stage()
    stage.actor()
    with pytest.raises(InvalidJobId, match=r"^Job ID 'j1' already in use$"):
        stage.actor()
    await stage.manager.cancel("j1")
    stage.actor()
    await stage.close()


@both_loops
async def test_a_job_without_default_needs_an_id() -> None:
    stage = Stage()
    with pytest.raises(InvalidJobId, match=r"^An explicit job ID is required$"):
        stage.manager.create(Actor(clock=stage.clock))
    with pytest.raises(InvalidJobId, match=r"^Cannot specify job ID for internal job$"):
        stage.manager.create(Actor(clock=stage.clock), "a", internal=True)


@both_loops
async def test_block_jobs_without_id_are_named_after_their_device_or_numbered() -> None:
    stage = Stage()
    devices = ["sda", "sda", "", "#block7"]
    jobs = [stage.manager.create(BlockActor(clock=stage.clock, device=device)) for device in devices]
    assert [job.id for job in jobs] == ["sda", "backup-1", "backup-2", "backup-3"]
    await stage.close()


@both_loops
async def test_unknown_jobs_are_not_found_by_any_verb() -> None:
    stage = Stage()
    manager = stage.manager
    for verb in (manager.pause, manager.resume, manager.dismiss):
        with pytest.raises(JobNotFound, match=r"^Job not found$"):
            verb("j1")
    for coroutine in (manager.cancel, manager.complete, manager.finalize):
        with pytest.raises(JobNotFound, match=r"^Job not found$"):
            await coroutine("j1")


@both_loops
async def test_jobs_are_listed_newest_first() -> None:
    stage = Stage()
    for job_id in "abc":
        stage.actor(job_id)
    assert [info["id"] for info in stage.manager.query()] == ["c", "b", "a"]
    await stage.close()


@both_loops
async def test_query_tells_progress_rate_and_time_left() -> None:
    stage = Stage()
    job = stage.actor()
    await stage.start(job)
    job.progress.set_remaining(1000)
    job.progress.advance(100)
    await stage.clock.advance(2)
    assert stage.manager.query() == [
        {
            "id": "j1",
            "type": "actor",
            "status": "running",
            "current-progress": 100,
            "total-progress": 1000,
            "rate": 50.0,
            "eta": 18.0,
        }
    ]
    await stage.close()


@both_loops
async def test_block_query_has_the_members_that_clients_know() -> None:
    stage = Stage()
    job = BlockActor(clock=stage.clock, device="sda", speed=5, auto_dismiss=False)
    stage.manager.create(job)
    assert BlockJobNames(stage.manager).query() == [
        {
            "type": "backup",
            "device": "sda",
            "len": 0,
            "offset": 0,
            "busy": False,
            "paused": True,
            "speed": 5,
            "io-status": "ok",
            "ready": False,
            "status": "created",
            "auto-finalize": True,
            "auto-dismiss": False,
        }
    ]
    await stage.close()


@both_loops
async def test_discard_takes_a_created_job_back_without_calling_hooks() -> None:
    stage = Stage()
    job = stage.actor()
    stage.manager.discard(job)
    assert (job.calls, stage.events.words(), stage.manager.query()) == ([], ["created", "null"], [])


@both_loops
async def test_shutdown_ends_jobs_in_every_status_and_admits_no_more() -> None:
    stage = Stage()
    stage.actor("created")
    running = stage.actor("running")
    paused = stage.actor("paused")
    pending = stage.actor("pending", auto_finalize=False)
    concluded = stage.actor("concluded", auto_dismiss=False)
    grouped = stage.actor("g1")
    waiting = stage.actor("g2", transaction=grouped.transaction)
    ready = stage.mirror("ready")
    await stage.start(running, paused, pending, concluded, grouped, waiting, ready)
    stage.manager.pause("paused")
    for job in (pending, concluded, waiting, ready):
        job.release()
    await settle()
    statuses = {info["id"]: info["status"] for info in stage.manager.query()}
    assert {key: value for key, value in statuses.items() if key != value} == {
        "g1": "running",
        "g2": "waiting",
    }
    await stage.manager.shutdown()
    assert stage.manager.all_jobs() == []
    with pytest.raises(JobError, match="shutting down"):
        stage.actor()


def _block_job(stage: Stage, device: str, job_id: str | None = None) -> BlockActor:
    job = BlockActor(clock=stage.clock, device=device)
    stage.manager.create(job, job_id)
    return job


@both_loops
async def test_an_only_job_without_id_is_found_by_its_device() -> None:
    stage = Stage()
    names = BlockJobNames(stage.manager)
    job = _block_job(stage, "sda")
    assert names.find("sda") is job
    with pytest.raises(JobNotFound, match=r"^Block job 'sdb' not found$"):
        names.find("sdb")
    await stage.close()


@pytest.mark.parametrize("second_id", [None, "explicit"])
@both_loops
async def test_a_device_used_in_the_new_way_is_no_name_for_its_jobs(second_id: str | None) -> None:
    stage = Stage()
    names = BlockJobNames(stage.manager)
    first = _block_job(stage, "sda")
    second = _block_job(stage, "sda", second_id)
    with pytest.raises(JobError, match=r"Device 'sda' is used with job IDs.*query-jobs"):
        names.find("sda")
    assert second.id is not None
    assert names.find(second.id) is second
    assert stage.manager.find("sda") is first
    await stage.manager.cancel(second.id)
    with pytest.raises(JobError, match="query-jobs"):
        names.find("sda")
    await stage.close()


@both_loops
async def test_an_explicit_id_that_is_the_devices_name_is_an_id() -> None:
    stage = Stage()
    names = BlockJobNames(stage.manager)
    job = _block_job(stage, "sda", "sda")
    assert names.find("sda") is job
    await stage.close()


@both_loops
async def test_block_job_cancel_needs_force_for_a_paused_job() -> None:
    stage = Stage()
    job = BlockActor(clock=stage.clock)
    stage.add(job)
    await stage.start(job)
    stage.manager.pause("j1")
    await settle()
    with pytest.raises(JobError, match=r"^The block job for device 'j1' is currently paused$"):
        await cancel_block_job(job)
    await cancel_block_job(job, force=True)
    await settle()
    assert job.status.value == "null"
