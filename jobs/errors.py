"""What goes wrong with jobs.

JobError                a verb, an option or a job failed; the text is meant for the user
  ├─ JobNotFound        no visible job has this id
  └─ InvalidJobId       an id is malformed, missing or taken
TransitionError         a defect in this package: a status change that the table does not have
"""

from __future__ import annotations

import os

__all__ = ["InvalidJobId", "JobError", "JobNotFound", "TransitionError", "describe_failure"]


class JobError(Exception):
    """A job, or an operation on one, failed. ``str()`` is the whole message for the user."""


class JobNotFound(JobError):
    """No job that the user may see has the given id."""

    def __init__(self, text: str = "Job not found") -> None:
        super().__init__(text)


class InvalidJobId(JobError):
    """A job id is malformed, missing where it is required, or already in use."""


class TransitionError(AssertionError):
    """A status change outside the table: an impossible path, to be reported as a defect."""


def describe_failure(failure: BaseException) -> str:
    """The text under which a job reports ``failure``: the message, or the system's text for an errno."""
    if isinstance(failure, JobError):
        return str(failure)
    if isinstance(failure, OSError) and failure.errno is not None:
        return failure.strerror or os.strerror(failure.errno)
    return f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__
