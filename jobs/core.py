"""What a job is: its identity, status, result and progress, and the events that tell of them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import TYPE_CHECKING, Any, Protocol

from jobs.clock import Clock, LoopClock
from jobs.errors import JobError, describe_failure
from jobs.hooks import JobEvent, JobHooks
from jobs.progress import Progress
from jobs.status import ENDED, JobStatus, check_transition

if TYPE_CHECKING:
    from jobs.transaction import Transaction

__all__ = ["Host", "JobCore"]

log = logging.getLogger(__name__)


class Host(Protocol):
    """What a job needs from its manager."""

    clock: Clock

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to everybody who listens."""

    def forget(self, job: JobCore) -> None:
        """Remove a job that is gone."""


class JobCore(JobHooks):
    """The state of a job that is not about pausing. Loop thread only."""

    def __init__(
        self, *, auto_finalize: bool = True, auto_dismiss: bool = True, clock: Clock | None = None
    ) -> None:
        """``auto_finalize``: conclude without job-finalize. ``auto_dismiss``: vanish without job-dismiss.

        ``clock`` is for tests; it has to be the manager's.
        """
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.clock: Clock = clock or LoopClock()
        # set once, by the manager
        self.id: str | None = None
        self.explicit_id = False
        self._host: Host | None = None
        self._transaction: Transaction | None = None
        # life
        self.status = JobStatus.UNDEFINED
        self.started = False
        self.progress = Progress(lambda: self.clock.now())
        self._task: asyncio.Task[None] | None = None
        self._set_up_over = asyncio.Event()  # clear while `set_up` is at work
        self._set_up_over.set()
        self._run_over = asyncio.Event()
        self._concluded = asyncio.Event()
        # result
        self.force_cancelled = False
        self._error: str | None = None

    @property
    def name(self) -> str:
        """The id, or for an internal job something to tell it by in logs."""
        return self.id if self.id is not None else f"<internal {self.type}>"

    @property
    def internal(self) -> bool:
        """Whether the job is the server's own: no id, no events, not in any list."""
        return self.id is None

    @property
    def transaction(self) -> Transaction:
        """The transaction that decides about the job's end; raises RuntimeError before creation."""
        if self._transaction is None:
            raise RuntimeError(f"a {self.type} job has not been created by a manager")
        return self._transaction

    @property
    def is_ready(self) -> bool:
        """Whether the job is in sync, running or not."""
        return self.status in (JobStatus.READY, JobStatus.STANDBY)

    @property
    def run_over(self) -> bool:
        """Whether the job's own work has come to an end, whatever its result."""
        return self._run_over.is_set()

    @property
    def ended(self) -> bool:
        """Whether the job's status says that its work is over."""
        return self.status in ENDED

    @property
    def failed(self) -> bool:
        """Whether the job has failed or is cancelled by force."""
        return self.force_cancelled or self._error is not None

    @property
    def error(self) -> str | None:
        """Why the job failed, once its run is over; "Operation canceled" for a cancelled one."""
        if self._error is None and self.force_cancelled and self.ended:
            return os.strerror(errno.ECANCELED)
        return self._error

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event; nothing is sent for internal jobs."""
        if self._host is not None and not self.internal:
            self._host.emit(name, data)

    async def wait_concluded(self) -> None:
        """Return once the job is concluded or gone."""
        await self._concluded.wait()

    def _event_progress(self) -> dict[str, Any]:
        return {"current-progress": self.progress.current, "total-progress": self.progress.total}

    def _announce(self, event: JobEvent, details: dict[str, Any]) -> None:
        if self.internal:
            return
        self.on_event(event, details)
        if event.value is not None:
            self.emit(event.value, {"id": self.id, "type": self.type, **details})

    def _set_status(self, new: JobStatus) -> None:
        """The one place where a status changes."""
        check_transition(self.name, self.status, new)
        log.debug("job %s: %s -> %s", self.name, self.status.value, new.value)
        self.status = new
        self.emit(JobEvent.STATUS.value, {"id": self.id, "status": new.value})

    def _record(self, failure: BaseException, where: str) -> None:
        """Keep the first failure as the job's result; log what is a defect rather than a failure."""
        if not isinstance(failure, JobError | OSError):
            log.error("job %s: %s of type '%s' raised", self.name, where, self.type, exc_info=failure)
        if self._error is None:
            self._error = describe_failure(failure)
