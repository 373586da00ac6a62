"""The block-job-* commands: jobs on disks, as clients from before generic jobs know them."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from jobs.block.blockjob import BlockJob
from jobs.block.legacy import cancel_block_job
from jobs.errors import JobNotFound
from jobs.onerror import IoStatus
from jobs.status import JobStatus
from nbd_backend.control.arguments import Arguments, Int64
from nbd_backend.control.commands.job_events import JobType
from nbd_backend.control.commands.jobs import JobReference
from nbd_backend.control.context import Context
from nbd_backend.control.errors import DeviceNotActive, GenericError
from nbd_backend.control.registry import command

__all__ = ["BlockJobCancel", "BlockJobInfo", "BlockJobReference", "BlockJobSetSpeed"]


class BlockJobReference(Arguments, frozen=True):
    """A block job by its id; by the name of its disk where that has always been enough."""

    device: str


class BlockJobCancel(Arguments, frozen=True):
    """Without ``force`` a ready job keeps its result."""

    device: str
    force: bool = False


class BlockJobSetSpeed(Arguments, frozen=True):
    """``speed`` in bytes a second; 0 is no bound."""

    device: str
    speed: Int64


class BlockJobInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """A block job; ``len`` and ``offset`` in bytes."""

    type: JobType
    device: str
    len: Int64
    offset: Int64
    busy: bool
    paused: bool
    speed: Int64
    io_status: IoStatus
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | UnsetType = UNSET


def _find(context: Context, name: str) -> BlockJob:
    try:
        return context.block_jobs.find(name)
    except JobNotFound as failure:
        raise DeviceNotActive(str(failure)) from None


@command("query-block-jobs", returns=list[BlockJobInfo], since="1.1")
async def query_block_jobs(context: Context, arguments: None) -> object:
    """Every block job, newest first."""
    return context.block_jobs.query()


@command("block-job-pause", arguments=BlockJobReference, since="1.3")
async def block_job_pause(context: Context, arguments: BlockJobReference) -> None:
    """As job-pause."""
    _find(context, arguments.device).user_pause()


@command("block-job-resume", arguments=BlockJobReference, since="1.3")
async def block_job_resume(context: Context, arguments: BlockJobReference) -> None:
    """As job-resume."""
    _find(context, arguments.device).user_resume()


@command("block-job-complete", arguments=BlockJobReference, since="1.3")
async def block_job_complete(context: Context, arguments: BlockJobReference) -> None:
    """As job-complete."""
    await _find(context, arguments.device).user_complete()


@command("block-job-cancel", arguments=BlockJobCancel, since="1.1")
async def block_job_cancel(context: Context, arguments: BlockJobCancel) -> None:
    """As job-cancel, but soft: a job paused by the user is refused without ``force``."""
    await cancel_block_job(_find(context, arguments.device), force=arguments.force)


@command("block-job-set-speed", arguments=BlockJobSetSpeed, since="1.1")
async def block_job_set_speed(context: Context, arguments: BlockJobSetSpeed) -> None:
    """Bound the background work of a job from now on."""
    job = _find(context, arguments.device)
    if arguments.speed < 0:
        raise GenericError("Parameter 'speed' expects a non-negative value")
    await job.set_option("speed", arguments.speed)


@command("block-job-finalize", arguments=JobReference, since="2.12")
async def block_job_finalize(context: Context, arguments: JobReference) -> None:
    """As job-finalize."""
    await _find(context, arguments.id).user_finalize()


@command("block-job-dismiss", arguments=JobReference, since="2.12")
async def block_job_dismiss(context: Context, arguments: JobReference) -> None:
    """As job-dismiss."""
    _find(context, arguments.id).user_dismiss()
