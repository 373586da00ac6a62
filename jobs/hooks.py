"""What a job type defines: its name, what it can do, its code, and what it does at the turns of its life.

`JobHooks` is the part of `jobs.job.Job` that authors of job types read first. All hooks run on the event
loop's thread, with nothing held.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

from jobs.status import Verb

__all__ = ["JobEvent", "JobHooks", "Option", "settable"]

log = logging.getLogger(__name__)
Setter = TypeVar("Setter", bound=Callable[..., Awaitable[None] | None])


class JobEvent(Enum):
    """Moments in a job's life; the value is the name of the generic event, None if it has none."""

    STATUS = "JOB_STATUS_CHANGE"
    STARTED = "JOB_STARTED"
    READY = "JOB_READY"
    PENDING = None
    COMPLETED = "JOB_COMPLETED"
    CANCELLED = "JOB_CANCELLED"
    ERROR = "JOB_ERROR"


@dataclass(frozen=True)
class Option:
    """An option that can be changed while the job lives: its name, type, verb, and the setter's name."""

    name: str
    kind: Any
    verb: Verb
    attribute: str = ""


def settable(name: str, kind: Any, *, verb: Verb = Verb.CHANGE) -> Callable[[Setter], Setter]:
    """Declare the decorated method as setter of the option ``name``.

    The value has been converted to ``kind`` (anything msgspec knows). The setter, plain or async, runs on
    the loop's thread, raises `JobError` to refuse, and must then have changed nothing. ``verb`` decides in
    which statuses the option can be set.
    """

    def mark(method: Setter) -> Setter:
        method.__dict__["job_option"] = Option(name, kind, verb, method.__name__)
        return method

    return mark


class JobHooks(ABC):
    """Attributes and hooks of a job type; everything but `type` and `run` has a default."""

    #: the job type's name, as users see it
    type: ClassVar[str] = ""
    #: whether job-complete has a meaning once the job is ready
    completable: ClassVar[bool] = False
    #: whether a ready job can be cancelled softly: ended in order, keeping its result
    soft_cancellable: ClassVar[bool] = False
    #: options that can be changed, by name; collected from `settable`
    changeable: ClassVar[Mapping[str, Option]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {o.name: o for m in vars(cls).values() if (o := getattr(m, "job_option", None)) is not None}
        cls.changeable = {**cls.changeable, **own}

    @abstractmethod
    async def run(self) -> None:
        """Do the job's work, meeting a stop at least every 100 ms of work.

        Called once, after start, in the job's own task. Returning means success; `JobError` and `OSError`
        mean failure, with their text; any other exception is a defect in the job type, logged, and a failure.
        asyncio.CancelledError is a forced cancel: clean up what `clean` does not, and let it pass.
        """

    def set_up(self) -> Awaitable[None] | None:
        """Take what the job needs, and its point in time, if it has one.

        Called once, after the job was created and before it is started. Raising discards the job: no other
        hook is called, so `set_up` has to undo what it did. May be async.
        """
        return None

    def prepare(self) -> Awaitable[None] | None:
        """Do what can still fail, before anything becomes final.

        Called after `run` succeeded in *every* member of the transaction and, with manual finalize, after
        job-finalize. The job's status is pending. Raising fails the job, and with it the whole transaction:
        `abort` is called instead of `commit`. May be async. Must undo nothing itself: `abort` does.
        """
        return None

    def commit(self) -> Awaitable[None] | None:
        """Make the result final. Called after `prepare` succeeded in every member of the transaction.

        Nothing can be rolled back any more, so it should not fail. If it raises, the job is reported failed,
        and the other members still commit. May be async.
        """
        return None

    def abort(self) -> Awaitable[None] | None:
        """Undo what was done. Called instead of `commit` when any member failed or was cancelled.

        `run` may have failed, been cancelled, succeeded, or never been started; `prepare` may or may not have
        been called. Raising is logged and otherwise ignored. May be async.
        """
        return None

    def clean(self) -> Awaitable[None] | None:
        """Release what the job holds. Called once, last, after `commit` or `abort`. May be async.

        Not called when the job was discarded before it was started. Raising fails a job that had not failed.
        """
        return None

    def before_pause(self) -> Awaitable[None] | None:
        """Finish what is in flight: called in the job's task, before it parks. May be async.

        Raising counts as raising from `run`, where it passes through.
        """
        return None

    def after_pause(self) -> Awaitable[None] | None:
        """Called in the job's task when it goes on after parking; not if cancelled. As `before_pause`."""
        return None

    def on_cancel(self, force: bool) -> None:
        """A cancel was asked for: hurry slices in flight. Not async; raising is logged and ignored."""
        log.debug("%s: cancel asked for (force=%s)", self.type, force)

    def on_resume(self) -> None:
        """The user resumes the job, or it is cancelled while the user had paused it. As `on_cancel`."""
        log.debug("%s: resumed", self.type)

    def on_complete(self) -> Awaitable[None] | None:
        """job-complete was asked for. Raise `JobError` to refuse: the job goes on as before. May be async."""
        return None

    def on_event(self, event: JobEvent, details: Mapping[str, Any]) -> None:
        """Emit the subsystem's own events for ``event``, by `emit`: called just before the generic one.

        ``details`` are the members of the generic event, without id and type. Not called for
        `JobEvent.STATUS`, nor for internal jobs. Must not raise.
        """
        log.debug("%s: %s %s", self.type, event.name, details)

    def default_id(self) -> str | None:
        """The id for a job that is created without one; None makes an explicit id necessary."""
        return None

    def extra_info(self) -> dict[str, Any]:
        """Members that this job type adds to its entry in query-jobs; JSON values."""
        return {}
