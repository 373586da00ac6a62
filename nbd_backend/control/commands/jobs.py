"""Commands about jobs of every kind."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from jobs.status import JobStatus
from jobs.types import JobTypes
from nbd_backend.control.arguments import Arguments, Int64
from nbd_backend.control.commands.job_events import OURS
from nbd_backend.control.context import Context
from nbd_backend.control.registry import command

__all__ = ["JobCreate", "JobInfo", "JobReference", "JobSetOption"]

_types = JobTypes()


class JobReference(Arguments, frozen=True):
    """A job by its id."""

    id: str


class JobCreate(Arguments, frozen=True):
    """A job of any type, built in or announced by an installed package, with that type's options."""

    type: str
    id: str | UnsetType = UNSET
    options: dict[str, Any] | UnsetType = UNSET


class JobSetOption(Arguments, frozen=True):
    """One option of a job that can be changed while it lives."""

    id: str
    name: str
    value: Any


class JobInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """A job. The unit of progress is the job's own; types may add members."""

    id: str
    type: str
    status: JobStatus
    current_progress: Int64
    total_progress: Int64
    error: str | UnsetType = UNSET


@command("query-jobs", returns=list[JobInfo], since="3.0")
async def query_jobs(context: Context, arguments: None) -> object:
    """Every job, newest first."""
    return context.jobs.query()


@command("job-pause", arguments=JobReference, since="3.0")
async def job_pause(context: Context, arguments: JobReference) -> None:
    """Stop a job at its next pause point, until job-resume."""
    context.jobs.pause(arguments.id)


@command("job-resume", arguments=JobReference, since="3.0")
async def job_resume(context: Context, arguments: JobReference) -> None:
    """Take back job-pause, or go on after an error that stopped the job."""
    context.jobs.resume(arguments.id)


@command("job-cancel", arguments=JobReference, since="3.0")
async def job_cancel(context: Context, arguments: JobReference) -> None:
    """End a job now; what it has done so far is of no use."""
    await context.jobs.cancel(arguments.id)


@command("job-complete", arguments=JobReference, since="3.0")
async def job_complete(context: Context, arguments: JobReference) -> None:
    """End a ready job the way it is meant to end."""
    await context.jobs.complete(arguments.id)


@command("job-finalize", arguments=JobReference, since="3.0")
async def job_finalize(context: Context, arguments: JobReference) -> None:
    """Make the results of a pending job, and of its whole transaction, final."""
    await context.jobs.finalize(arguments.id)


@command("job-dismiss", arguments=JobReference, since="3.0")
async def job_dismiss(context: Context, arguments: JobReference) -> None:
    """Forget a concluded job."""
    context.jobs.dismiss(arguments.id)


@command("job-set-option", arguments=JobSetOption, since=OURS)
async def job_set_option(context: Context, arguments: JobSetOption) -> None:
    """Change an option of a job while it lives."""
    await context.jobs.set_option(arguments.id, arguments.name, arguments.value)


@command("job-create", arguments=JobCreate, since=OURS)
async def job_create(context: Context, arguments: JobCreate) -> None:
    """Start a job of any type; a name that is not ours is looked for among installed packages."""
    options = {} if arguments.options is UNSET else arguments.options
    job = await _types.create(arguments.type, context, options)
    await context.jobs.launch(job, None if arguments.id is UNSET else arguments.id)
