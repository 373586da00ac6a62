"""How the block-job-* commands find their job, and what they do differently from job-*.

The ``device`` they take is a job id. Clients from before job ids pass the name of a disk instead; that works
while the disk has only ever had one job at a time, created without an id. Once the disk has been used the
new way, with an explicit id or with a second job beside the first, its name is not an answer any more.
"""

from __future__ import annotations

from typing import Any

from jobs.block.blockjob import BlockJob
from jobs.errors import JobError, JobNotFound
from jobs.job import Job
from jobs.manager import JobManager

__all__ = ["BlockJobNames", "cancel_block_job"]


class BlockJobNames:
    """Finds block jobs by what block-job-* commands are given. Loop thread only."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager
        self._modern: set[str] = set()
        manager.observe(self._created)

    def _created(self, job: Job) -> None:
        """Note how the device of a new block job is used."""
        if isinstance(job, BlockJob) and (job.explicit_id or len(self._on(job.device)) > 1):
            self._modern.add(job.device)

    def find(self, name: str) -> BlockJob:
        """The job that ``name`` means.

        Raises `JobNotFound` (for clients: DeviceNotActive), or `JobError` for the name of a disk that
        does not tell its jobs apart.
        """
        by_id = self._manager.get(name)
        if isinstance(by_id, BlockJob) and (by_id.explicit_id or name != by_id.device):
            return by_id
        on_device = self._on(name)
        if on_device and name in self._modern:
            raise JobError(
                f"Device '{name}' is used with job IDs: address its jobs by ID instead of device name"
                f" (query-jobs lists them)"
            )
        if len(on_device) == 1:
            return on_device[0]
        raise JobNotFound(f"Block job '{name}' not found")

    def query(self) -> list[dict[str, Any]]:
        """The reply to query-block-jobs: newest first."""
        return [job.block_info() for job in self._manager if isinstance(job, BlockJob)]

    def _on(self, device: str) -> list[BlockJob]:
        return [job for job in self._manager if isinstance(job, BlockJob) and device and job.device == device]


async def cancel_block_job(job: BlockJob, *, force: bool = False) -> None:
    """block-job-cancel: as job-cancel, but soft unless ``force``; a job paused by the user needs that."""
    if job.user_paused and not force:
        raise JobError(f"The block job for device '{job.name}' is currently paused")
    await job.user_cancel(force)
