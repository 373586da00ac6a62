"""Start, watch and steer the jobs of a running server.

`start TYPE key=value…` starts a job, for example

    nbd-backend job start backup device=sda target=/backups/sda.qcow2 sync=full

A backup whose target has a slash in it makes that file (as QMP's drive-backup does); any other target is a
node. Other types, those of installed packages, take their own options. `watch` and `start --watch` follow
jobs to their end and exit with 4 if one failed or was cancelled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecuteError

from . import CliError, _format
from ._qmp import Session, add_address, parse_arguments, talk

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

FAILED = 4
"""Exit status when a job that was watched did not succeed."""
REFRESH_SECONDS = 0.25
STARTERS = {
    "backup": "blockdev-backup",
    "mirror": "blockdev-mirror",
    "commit": "block-commit",
    "stream": "block-stream",
}
VERBS = {
    "pause": "stop working until `resume`",
    "resume": "go on after `pause`, or after an error that stopped the job",
    "complete": "end a job that is ready",
    "finalize": "make the result of a job final that was started with auto-finalize=false",
    "dismiss": "forget a concluded job that was started with auto-dismiss=false",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, summary: str, act: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=f"{summary}.")
        add_address(made)
        made.set_defaults(act=act)
        return made

    start = action("start", "start a job", start_job)
    start.add_argument("type", metavar="TYPE", help="backup, or another type that the server has")
    start.add_argument("words", nargs="*", metavar="KEY=VALUE", help="the command's arguments")
    start.add_argument("--watch", action="store_true", help="follow it to its end")
    listing = action("list", "show all jobs", list_jobs)
    listing.add_argument("--json", action="store_true", help="for programs: what query-jobs says")
    watch = action("watch", "follow jobs to their end", watch_jobs)
    watch.add_argument("ids", nargs="*", metavar="ID", help="these jobs; default: all there are")
    for verb, summary in VERBS.items():
        action(verb, summary, steer).add_argument("id", metavar="ID")
    cancel = action("cancel", "end a job now", cancel_job)
    cancel.add_argument("id", metavar="ID")
    cancel.add_argument(
        "--soft", action="store_true", help="a ready mirror: keep the target as a consistent copy"
    )
    change = action("set", "change options of a job that runs", set_options)
    change.add_argument("id", metavar="ID")
    change.add_argument(
        "words", nargs="+", metavar="KEY=VALUE", help="such as speed=50000000 (bytes a second)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for."""
    status: int = arguments.act(arguments)
    return status


# ---- start and steer ----


def start_command(job_type: str, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The QMP command that starts a job of this type, and its arguments."""
    if job_type == "backup" and "/" in str(values.get("target", "")):
        return "drive-backup", {**values, "target": str(Path(values["target"]).absolute())}
    if job_type in STARTERS:
        return STARTERS[job_type], values
    options = {name: value for name, value in values.items() if name != "job-id"}
    identity = {"id": values["job-id"]} if "job-id" in values else {}
    return "job-create", {"type": job_type, "options": options, **identity}


def start_job(arguments: argparse.Namespace) -> int:
    """``job start``."""
    values = parse_arguments(arguments.words)
    command, members = start_command(arguments.type, values)

    async def start(session: Session) -> int:
        async with session.job_events() as events:
            before = {job["id"] for job in await session.execute("query-jobs")}
            await _launch(session, arguments.type, command, members)
            started = await _started(session, events, before, values.get("job-id"))
            if arguments.watch:
                return await follow_job(session, started, events)
            print(started)
            return 0

    return talk(arguments, start)


async def _launch(session: Session, job_type: str, command: str, members: dict[str, Any]) -> None:
    try:
        await session.execute(command, members)
    except CliError as error:
        if _error_class(error) == "CommandNotFound":
            raise CliError(f"this server has no jobs of type '{job_type}'") from error
        raise


def _error_class(error: CliError) -> str:
    """The class of the QMP error that `error` reports, empty if it is none."""
    return error.__cause__.error_class if isinstance(error.__cause__, ExecuteError) else ""


async def _started(
    session: Session, events: AsyncIterator[dict[str, Any]], before: set[str], wanted: str | None
) -> str:
    """The new job's id; a short one may be over already, but its first event has come by then."""
    if wanted is not None:
        return wanted
    for job in await session.execute("query-jobs"):
        if job["id"] not in before:
            return str(job["id"])
    async for event in events:
        if event["event"] == "JOB_STATUS_CHANGE" and event["data"]["id"] not in before:
            return str(event["data"]["id"])
    raise CliError("the server has ended")


def steer(arguments: argparse.Namespace) -> int:
    """``job pause`` and the others that take nothing but an id."""
    _ask(arguments, f"job-{arguments.action}", {"id": arguments.id})
    return 0


def _ask(arguments: argparse.Namespace, command: str, members: dict[str, Any]) -> None:
    """Run a command about one job. Raises CliError, which names the job that the server's text may not."""
    try:
        talk(arguments, lambda session: session.execute(command, members))
    except CliError as error:
        if not _error_class(error) or f"'{arguments.id}'" in str(error):
            raise
        raise CliError(f"'{arguments.id}': {error}; `nbd-backend job list` shows all jobs") from error


def cancel_job(arguments: argparse.Namespace) -> int:
    """``job cancel``."""
    command, members = "job-cancel", {"id": arguments.id}
    if arguments.soft:
        command, members = "block-job-cancel", {"device": arguments.id}
    _ask(arguments, command, members)
    return 0


def set_options(arguments: argparse.Namespace) -> int:
    """``job set``."""
    options = parse_arguments(arguments.words)

    async def change(session: Session) -> None:
        for name, value in options.items():
            if name == "speed":
                await session.execute("block-job-set-speed", {"device": arguments.id, "speed": value})
            else:
                await session.execute("job-set-option", {"id": arguments.id, "name": name, "value": value})

    talk(arguments, change)
    return 0


# ---- look ----


def list_jobs(arguments: argparse.Namespace) -> int:
    """``job list``."""
    jobs = talk(arguments, lambda session: session.execute("query-jobs"))
    if arguments.json:
        print(json.dumps(jobs))
    elif jobs:
        _print_table(jobs)
    else:
        print("no jobs")
    return 0


def _print_table(jobs: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("ID", "TYPE", "STATUS", "DONE", "OF", "RATE", "TIME LEFT", "ERROR"):
        table.add_column(heading, overflow="fold")
    for job in jobs:
        table.add_row(
            job["id"],
            job["type"],
            job["status"],
            _format.size(job["current-progress"]),
            _format.size(job["total-progress"]),
            _rate(job),
            _left(job),
            job.get("error", ""),
        )
    Console(highlight=False, markup=False).print(table)


def _rate(job: dict[str, Any]) -> str:
    return f"{_format.size(job['rate'])}/s" if job.get("rate") else ""


def _left(job: dict[str, Any]) -> str:
    return _format.duration(job["eta"]) if job.get("eta") is not None else ""


# ---- watch ----


async def follow_job(session: Session, job: str, events: AsyncIterator[dict[str, Any]]) -> int:
    """Show a job's progress until its end; the exit status. `events`: the session's since before it was
    started.
    """
    return await _Watch(session, {job}).follow(events)


def watch_jobs(arguments: argparse.Namespace) -> int:
    """``job watch``."""

    async def watch(session: Session) -> int:
        async with session.job_events() as events:
            present = {job["id"]: job for job in await session.execute("query-jobs")}
            unknown = set(arguments.ids) - set(present)
            if unknown:
                raise CliError(f"there is no job '{min(unknown)}'; `nbd-backend job list` shows all")
            wanted = set(arguments.ids) or set(present)
            if not wanted:
                print("no jobs")
                return 0
            watching = _Watch(session, wanted)
            for name in wanted:
                watching.note(present[name])
            return await watching.follow(events)

    return talk(arguments, watch)


class _Watch:
    """Bars for a set of jobs, until each has ended or waits for the user."""

    def __init__(self, session: Session, ids: set[str]) -> None:
        self._session = session
        self._watched = set(ids)
        self._left = set(ids)
        self._failed: dict[str, str] = {}
        self._tasks: dict[str, TaskID] = {}

    def note(self, job: dict[str, Any]) -> None:
        """Take a job's state from before the first event: one that is over sends no more events."""
        if job["status"] == "concluded":
            self._left.discard(job["id"])
            if "error" in job:
                self._failed[job["id"]] = job["error"]

    async def follow(self, events: AsyncIterator[dict[str, Any]]) -> int:
        """Show progress, and at the end how each job fared; the exit status."""
        watched = sorted(self._watched)
        if not sys.stdout.isatty():  # where bars are not drawn
            print(f"watching {', '.join(watched)}", flush=True)
        with _progress() as progress:
            reader = asyncio.create_task(self._read(events))
            try:
                while self._left and not reader.done():
                    self._show(progress, await self._session.execute("query-jobs"))
                    await asyncio.wait({reader}, timeout=REFRESH_SECONDS)
            finally:
                reader.cancel()
            if self._left:
                raise CliError("the server has ended")
            self._complete(progress)
        for name in watched:
            print(f"job {name}: {self._failed.get(name, 'done')}")
        return FAILED if self._failed else 0

    async def _read(self, events: AsyncIterator[dict[str, Any]]) -> None:
        async for event in events:
            self._take(event["event"], event["data"])
            if not self._left:
                return

    def _take(self, name: str, data: dict[str, Any]) -> None:
        job = data.get("id", data.get("device"))
        if job not in self._left:
            return
        if name == "BLOCK_JOB_CANCELLED":
            self._failed[job] = "cancelled"
        elif name == "BLOCK_JOB_COMPLETED" and "error" in data:
            self._failed[job] = data["error"]
        elif name == "JOB_STATUS_CHANGE" and data["status"] in {"concluded", "null"}:
            self._left.discard(job)

    def _show(self, progress: Progress, jobs: list[dict[str, Any]]) -> None:
        for job in jobs:
            if job["id"] not in self._left and job["id"] not in self._tasks:
                continue
            if job["id"] not in self._tasks:
                self._tasks[job["id"]] = progress.add_task(job["id"], total=None)
            progress.update(
                self._tasks[job["id"]],
                description=f"{job['id']} ({job['type']}, {job['status']})",
                completed=job["current-progress"],
                total=job["total-progress"] or None,
            )

    def _complete(self, progress: Progress) -> None:
        """Jobs vanish between two looks at them: what did not fail has done all that it had to do."""
        for name, task in self._tasks.items():
            if name not in self._failed:
                progress.update(task, completed=progress.tasks[task].total or 0, description=f"{name} (done)")


def _progress() -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
