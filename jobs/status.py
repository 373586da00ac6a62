"""The life of a job as two tables: which status may follow which, and which verb each status accepts.

    undefined ─► created ─► running ◄─► paused
                   │           ├─► ready ◄─► standby
                   │           ▼      ▼
                   │        waiting ─► pending ─► concluded ─► null
                   └──► aborting (from everywhere but paused and standby) ─► concluded

A paused or standby job returns to running or ready before it may go anywhere else.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from jobs.errors import JobError, TransitionError

__all__ = ["ENDED", "TRANSITIONS", "VERBS", "JobStatus", "Verb", "apply_verb", "check_transition", "refusal"]


class JobStatus(Enum):
    """Where a job is in its life; the value is the name used on the control socket."""

    UNDEFINED = "undefined"  #: constructed, not yet known to a manager
    CREATED = "created"  #: registered, not started
    RUNNING = "running"
    PAUSED = "paused"  #: stopped at a pause point, was running
    READY = "ready"  #: in sync; goes on until told to complete or cancel
    STANDBY = "standby"  #: stopped at a pause point, was ready
    WAITING = "waiting"  #: its work is done; other members of its transaction are still busy
    PENDING = "pending"  #: all members are done; waits for finalize
    ABORTING = "aborting"  #: failed or cancelled; being cleaned up
    CONCLUDED = "concluded"  #: over; only its result is kept, until dismiss
    NULL = "null"  #: gone


class Verb(Enum):
    """What a user may ask of a job; the value is the name used in refusals."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


_ORDER: Final = tuple(JobStatus)


def _row(cells: str) -> frozenset[JobStatus]:
    """The statuses whose column in ``cells`` is 1; columns are in the order of `JobStatus`."""
    return frozenset(status for status, cell in zip(_ORDER, cells.split(), strict=True) if cell == "1")


#: status -> the statuses that may follow
TRANSITIONS: Final = {
    #                       U C R P Y S W D X E N
    JobStatus.UNDEFINED: _row("0 1 0 0 0 0 0 0 0 0 0"),
    JobStatus.CREATED: _row("  0 0 1 0 0 0 0 0 1 0 1"),
    JobStatus.RUNNING: _row("  0 0 0 1 1 0 1 0 1 0 0"),
    JobStatus.PAUSED: _row("   0 0 1 0 0 0 0 0 0 0 0"),
    JobStatus.READY: _row("    0 0 0 0 0 1 1 0 1 0 0"),
    JobStatus.STANDBY: _row("  0 0 0 0 1 0 0 0 0 0 0"),
    JobStatus.WAITING: _row("  0 0 0 0 0 0 0 1 1 0 0"),
    JobStatus.PENDING: _row("  0 0 0 0 0 0 0 0 1 1 0"),
    JobStatus.ABORTING: _row(" 0 0 0 0 0 0 0 0 1 1 0"),
    JobStatus.CONCLUDED: _row("0 0 0 0 0 0 0 0 0 0 1"),
    JobStatus.NULL: _row("     0 0 0 0 0 0 0 0 0 0 0"),
}

#: verb -> the statuses that accept it
VERBS: Final = {
    #                  U C R P Y S W D X E N
    Verb.CANCEL: _row("   0 1 1 1 1 1 1 1 0 0 0"),
    Verb.PAUSE: _row("    0 1 1 1 1 1 0 0 0 0 0"),
    Verb.RESUME: _row("   0 1 1 1 1 1 0 0 0 0 0"),
    Verb.SET_SPEED: _row("0 1 1 1 1 1 0 0 0 0 0"),
    Verb.COMPLETE: _row(" 0 0 0 0 1 1 0 0 0 0 0"),
    Verb.FINALIZE: _row(" 0 0 0 0 0 0 0 1 0 0 0"),
    Verb.DISMISS: _row("  0 0 0 0 0 0 0 0 0 1 0"),
    Verb.CHANGE: _row("   0 1 1 1 1 1 0 0 0 0 0"),
}

#: statuses in which a job's own work is over
ENDED: Final = frozenset(
    {JobStatus.WAITING, JobStatus.PENDING, JobStatus.ABORTING, JobStatus.CONCLUDED, JobStatus.NULL}
)


def apply_verb(name: str, status: JobStatus, verb: Verb) -> None:
    """Raise `JobError` unless a job called ``name`` in ``status`` accepts ``verb``."""
    if status not in VERBS[verb]:
        raise refusal(name, status, verb)


def refusal(name: str, status: JobStatus, verb: Verb) -> JobError:
    """The error that says that a job in ``status`` does not accept ``verb``."""
    return JobError(f"Job '{name}' in state '{status.value}' cannot accept command verb '{verb.value}'")


def check_transition(name: str, old: JobStatus, new: JobStatus) -> None:
    """Raise `TransitionError` unless the job called ``name`` may go from ``old`` to ``new``."""
    if new not in TRANSITIONS[old]:
        raise TransitionError(
            f"job '{name}' cannot go from '{old.value}' to '{new.value}'; this is a defect, please report it"
        )
