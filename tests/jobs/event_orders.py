"""The events of a job's life, in their order: literal data, compared with our job layer and with QEMU.

A script is what a client sees and does: a word is an event (a status, or an event's name, with ``:action``
and ``:error`` where it has such members), ``>verb id`` a command of the client. With several jobs words carry
the id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IO_ERROR = 5
NO_SPACE = 28


@dataclass(frozen=True)
class Subject:
    """One job: its kind, id, flags, and what its work does."""

    kind: str = "backup"
    id: str = "j1"
    auto_finalize: bool = True
    auto_dismiss: bool = True
    endless: bool = False  # does not end within the test
    error: int = 0  # errno of one failing write
    on_error: str = "report"
    prepare_error: bool = False


@dataclass(frozen=True)
class Order:
    """A story with one job or several, which are then grouped in one transaction."""

    name: str
    subjects: tuple[Subject, ...]
    script: tuple[str, ...]
    abort_start: bool = False  # the transaction fails before any job starts
    qemu: bool = True  # whether QEMU can play it

    def events(self, lines: int | None = None) -> list[str]:
        """The events, without the commands, among the first ``lines`` of the script."""
        return [line for line in self.script[:lines] if not line.startswith(">")]


def _one(name: str, script: str, *, qemu: bool = True, **flags: Any) -> Order:
    return Order(name, (Subject(**flags),), tuple(_words(script)), qemu=qemu)


def _words(script: str) -> list[str]:
    """Words are separated by blanks; a command runs to the comma."""
    words: list[str] = []
    for part in script.split(","):
        text = part.strip()
        words += [text] if text.startswith(">") else text.split()
    return words


def _lines(script: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in script.splitlines() if line.strip())


ORDERS = [
    _one("backup", "created running waiting pending BLOCK_JOB_COMPLETED concluded null"),
    _one(
        "backup, manual finalize",
        "created running waiting pending BLOCK_JOB_PENDING, >job-finalize j1,"
        "BLOCK_JOB_COMPLETED concluded null",
        auto_finalize=False,
    ),
    _one(
        "backup, manual dismiss",
        "created running waiting pending BLOCK_JOB_COMPLETED concluded, >job-dismiss j1, null",
        auto_dismiss=False,
    ),
    _one(
        "backup, manual finalize and dismiss",
        "created running waiting pending BLOCK_JOB_PENDING, >job-finalize j1,"
        "BLOCK_JOB_COMPLETED concluded, >job-dismiss j1, null",
        auto_finalize=False,
        auto_dismiss=False,
    ),
    _one(
        "mirror, complete",
        "created running ready BLOCK_JOB_READY, >job-complete j1,"
        "waiting pending BLOCK_JOB_COMPLETED concluded null",
        kind="mirror",
    ),
    _one(
        "mirror, complete with manual finalize",
        "created running ready BLOCK_JOB_READY, >job-complete j1, waiting pending BLOCK_JOB_PENDING,"
        ">job-finalize j1, BLOCK_JOB_COMPLETED concluded null",
        kind="mirror",
        auto_finalize=False,
    ),
    _one(
        "mirror, soft cancel",
        "created running ready BLOCK_JOB_READY, >block-job-cancel j1,"
        "waiting pending BLOCK_JOB_COMPLETED concluded null",
        kind="mirror",
    ),
    _one(
        "mirror, forced cancel when ready",
        "created running ready BLOCK_JOB_READY, >job-cancel j1, aborting BLOCK_JOB_CANCELLED concluded null",
        kind="mirror",
    ),
    _one(
        "mirror, pause and resume when ready",
        "created running ready BLOCK_JOB_READY, >job-pause j1, standby, >job-resume j1, ready,"
        ">job-complete j1,"
        "waiting pending BLOCK_JOB_COMPLETED concluded null",
        kind="mirror",
    ),
    _one(
        "mirror, forced cancel in standby",
        "created running ready BLOCK_JOB_READY, >job-pause j1, standby, >job-cancel j1,"
        "ready aborting BLOCK_JOB_CANCELLED concluded null",
        kind="mirror",
    ),
    _one(
        "pause and resume, cancel",
        "created running, >job-pause j1, paused, >job-resume j1, running, >job-cancel j1,"
        "aborting BLOCK_JOB_CANCELLED concluded null",
        endless=True,
    ),
    _one(
        "cancel while running",
        "created running, >job-cancel j1, aborting BLOCK_JOB_CANCELLED concluded null",
        endless=True,
    ),
    _one(
        "soft cancel while running is forced",
        "created running, >block-job-cancel j1, aborting BLOCK_JOB_CANCELLED concluded null",
        endless=True,
    ),
    _one(
        "cancel while paused",
        "created running, >job-pause j1, paused, >job-cancel j1,"
        "running aborting BLOCK_JOB_CANCELLED concluded null",
        endless=True,
    ),
    _one(
        "cancel, manual dismiss",
        "created running, >job-cancel j1, aborting BLOCK_JOB_CANCELLED concluded, >job-dismiss j1, null",
        endless=True,
        auto_dismiss=False,
    ),
    _one(
        "cancel while pending",
        "created running waiting pending BLOCK_JOB_PENDING, >job-cancel j1,"
        "aborting BLOCK_JOB_CANCELLED concluded null",
        auto_finalize=False,
    ),
    _one(
        "error, report",
        "created running BLOCK_JOB_ERROR:report aborting BLOCK_JOB_COMPLETED:error concluded null",
        error=IO_ERROR,
    ),
    _one(
        "error, report, manual dismiss",
        "created running BLOCK_JOB_ERROR:report aborting BLOCK_JOB_COMPLETED:error concluded,"
        ">job-dismiss j1, null",
        error=IO_ERROR,
        auto_dismiss=False,
    ),
    _one(
        "error, stop, resume",
        "created running BLOCK_JOB_ERROR:stop paused, >job-resume j1,"
        "running waiting pending BLOCK_JOB_COMPLETED concluded null",
        error=IO_ERROR,
        on_error="stop",
    ),
    _one(
        "no space, enospc, resume",
        "created running BLOCK_JOB_ERROR:stop paused, >job-resume j1,"
        "running waiting pending BLOCK_JOB_COMPLETED concluded null",
        error=NO_SPACE,
        on_error="enospc",
    ),
    _one(
        "other error, enospc",
        "created running BLOCK_JOB_ERROR:report aborting BLOCK_JOB_COMPLETED:error concluded null",
        error=IO_ERROR,
        on_error="enospc",
    ),
    _one(
        "error, stop, cancel",
        "created running BLOCK_JOB_ERROR:stop paused, >job-cancel j1,"
        "running aborting BLOCK_JOB_CANCELLED concluded null",
        error=IO_ERROR,
        on_error="stop",
    ),
    _one(
        "error, ignore",
        "created running BLOCK_JOB_ERROR:ignore waiting pending BLOCK_JOB_COMPLETED concluded null",
        error=IO_ERROR,
        on_error="ignore",
    ),
    _one(
        "prepare fails",
        "created running waiting pending aborting BLOCK_JOB_COMPLETED:error concluded null",
        prepare_error=True,
        qemu=False,
    ),
    _one(
        "create",
        "created running waiting pending concluded, >job-dismiss j1, null",
        kind="create",
        auto_dismiss=False,
    ),
    _one(
        "create fails",
        "created running aborting concluded, >job-dismiss j1, null",
        kind="create",
        auto_dismiss=False,
        error=IO_ERROR,
    ),
    Order(
        "transaction refused before start",
        (Subject(),),
        ("created", "aborting", "concluded", "null"),
        abort_start=True,
    ),
    Order(
        "group, one fails",
        (Subject(id="g1", error=IO_ERROR), Subject(id="g2", endless=True)),
        _lines("""
            created g1
            created g2
            running g1
            running g2
            BLOCK_JOB_ERROR:report g1
            aborting g1
            aborting g2
            BLOCK_JOB_CANCELLED g2
            concluded g2
            null g2
            BLOCK_JOB_COMPLETED:error g1
            concluded g1
            null g1
        """),
    ),
    Order(
        "group, the user cancels the first",
        (Subject(id="x1", endless=True), Subject(id="x2", endless=True)),
        _lines("""
            created x1
            created x2
            running x1
            running x2
            >job-cancel x1
            aborting x1
            aborting x2
            BLOCK_JOB_CANCELLED x2
            concluded x2
            null x2
            BLOCK_JOB_CANCELLED x1
            concluded x1
            null x1
        """),
    ),
    Order(
        "group, the user cancels the second",
        (Subject(id="x1", endless=True), Subject(id="x2", endless=True)),
        _lines("""
            created x1
            created x2
            running x1
            running x2
            >job-cancel x2
            aborting x2
            BLOCK_JOB_CANCELLED x2
            concluded x2
            null x2
            aborting x1
            BLOCK_JOB_CANCELLED x1
            concluded x1
            null x1
        """),
    ),
    Order(
        "group, one done is cancelled with the other",
        (Subject(id="x1"), Subject(id="x2", endless=True)),
        _lines("""
            created x1
            created x2
            running x1
            running x2
            waiting x1
            >job-cancel x2
            aborting x2
            BLOCK_JOB_CANCELLED x2
            concluded x2
            null x2
            aborting x1
            BLOCK_JOB_CANCELLED x1
            concluded x1
            null x1
        """),
    ),
    Order(
        "group, all succeed",
        (Subject(id="x1"), Subject(id="x2")),
        _lines("""
            created x1
            created x2
            running x1
            running x2
            waiting x1
            waiting x2
            pending x2
            pending x1
            BLOCK_JOB_COMPLETED x2
            concluded x2
            null x2
            BLOCK_JOB_COMPLETED x1
            concluded x1
            null x1
        """),
    ),
    Order(
        "group, one waits for finalize",
        (Subject(id="x1", auto_finalize=False), Subject(id="x2")),
        _lines("""
            created x1
            created x2
            running x1
            running x2
            waiting x1
            waiting x2
            pending x2
            pending x1
            BLOCK_JOB_PENDING x1
            >job-finalize x2
            BLOCK_JOB_COMPLETED x2
            concluded x2
            null x2
            BLOCK_JOB_COMPLETED x1
            concluded x1
            null x1
        """),
    ),
    Order(
        "group, one pending is cancelled",
        (Subject(id="x1", auto_finalize=False), Subject(id="x2")),
        _lines("""
            created x1
            created x2
            running x1
            running x2
            waiting x1
            waiting x2
            pending x2
            pending x1
            BLOCK_JOB_PENDING x1
            >job-cancel x1
            aborting x2
            BLOCK_JOB_CANCELLED x2
            concluded x2
            null x2
            aborting x1
            BLOCK_JOB_CANCELLED x1
            concluded x1
            null x1
        """),
    ),
    Order(
        "group, one fails to prepare",
        (Subject(id="x1", prepare_error=True), Subject(id="x2")),
        _lines("""
            created x1
            created x2
            running x1
            running x2
            waiting x1
            waiting x2
            pending x2
            pending x1
            aborting x1
            aborting x2
            BLOCK_JOB_CANCELLED x2
            concluded x2
            null x2
            BLOCK_JOB_COMPLETED:error x1
            concluded x1
            null x1
        """),
        qemu=False,
    ),
]
