"""The events of jobs: of all (``JOB_*``), and of block jobs (``BLOCK_JOB_*``). The job layer emits them."""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from jobs.onerror import ErrorAction
from jobs.status import JobStatus
from nbd_backend.control.events import Event

OURS: Final = "nbd-backend 0.1"  # events that the interface we follow does not have
JobType = Literal["commit", "stream", "mirror", "backup", "create", "amend"]


class JobStatusChange(msgspec.Struct, frozen=True):
    """A job has a new status."""

    id: str
    status: JobStatus


class JobStarted(msgspec.Struct, frozen=True):
    """A job begins to run."""

    id: str
    type: str


class JobProgress(JobStarted, frozen=True, rename="kebab"):
    """How far a job is at a turn of its life; the unit is the job's own."""

    current_progress: int
    total_progress: int


class JobCompleted(JobProgress, frozen=True, kw_only=True, rename="kebab"):
    """A job has ended by itself, badly if ``success`` is false; ``error`` says why."""

    success: bool
    error: str | UnsetType = UNSET


class JobFailure(JobStarted, frozen=True):
    """An operation of a job failed, and what the job does about it."""

    operation: str
    action: ErrorAction
    error: str


class BlockJobReady(msgspec.Struct, frozen=True):
    """How far a block job is at a turn of its life, in bytes (as a rule). ``device`` is its id."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


class BlockJobEnd(BlockJobReady, frozen=True):
    """A block job has ended, badly if ``error`` is there."""

    error: str | UnsetType = UNSET


class BlockJobPending(msgspec.Struct, frozen=True):
    """A block job waits for job-finalize."""

    type: JobType
    id: str


class BlockJobFailure(msgspec.Struct, frozen=True):
    """A block job met an I/O error, and what it does about it."""

    device: str
    operation: Literal["read", "write"]
    action: ErrorAction


JOB_STATUS_CHANGE = Event("JOB_STATUS_CHANGE", JobStatusChange, since="3.0")
JOB_STARTED = Event("JOB_STARTED", JobStarted, since=OURS)
JOB_READY = Event("JOB_READY", JobProgress, since=OURS)
JOB_COMPLETED = Event("JOB_COMPLETED", JobCompleted, since=OURS)
JOB_CANCELLED = Event("JOB_CANCELLED", JobProgress, since=OURS)
# Not limited here, nor is BLOCK_JOB_ERROR: where errors are ignored, the job layer itself limits both.
JOB_ERROR = Event("JOB_ERROR", JobFailure, since=OURS)
BLOCK_JOB_READY = Event("BLOCK_JOB_READY", BlockJobReady, since="1.3")
BLOCK_JOB_COMPLETED = Event("BLOCK_JOB_COMPLETED", BlockJobEnd, since="1.1")
BLOCK_JOB_CANCELLED = Event("BLOCK_JOB_CANCELLED", BlockJobReady, since="1.1")
BLOCK_JOB_PENDING = Event("BLOCK_JOB_PENDING", BlockJobPending, since="2.12")
BLOCK_JOB_ERROR = Event("BLOCK_JOB_ERROR", BlockJobFailure, since="1.3")
