"""Show a live backup, from nothing to the proof, in about 20 seconds.

Makes a disk of three qcow2 layers with qemu-img, serves it, writes to it with fio over NBD while a backup
runs through QMP, and proves that the backup equals the disk at the moment the backup began, not the disk as
fio left it. Everything happens in a temporary directory, which is removed at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import PROGRAM, CliError, _format
from .job import follow_job

if TYPE_CHECKING:
    from ._qmp import Session

SIZE_MIB = 256
WRITE_SECONDS = 8
BACKUP_SPEED = 40 << 20
"""Bytes a second, so that there is something to see."""
START_SECONDS = 10.0
TOOLS = {"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "fio": "fio"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``demo``."""
    parser.add_argument("--directory", metavar="DIR", help="make the files here, and keep them")


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if missing:
        raise CliError(f"the demonstration needs more tools: apt install {' '.join(sorted(missing))}")
    if arguments.directory is not None:
        directory = Path(arguments.directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        return asyncio.run(_demonstrate(directory))
    with tempfile.TemporaryDirectory(prefix="nbd-backend-demo-") as temporary:
        return asyncio.run(_demonstrate(Path(temporary)))


async def _demonstrate(directory: Path) -> int:
    disk, reference, backup = (
        directory / "disk.qcow2",
        directory / "reference.raw",
        directory / "backup.qcow2",
    )
    _say(f"A disk of {SIZE_MIB} MiB in three layers, each with data of its own:")
    _make_chain(directory)
    _show_chain(disk)
    _say("What it holds now, read by qemu-img, to compare with later:")
    _tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, reference)
    _say("Serve it:")
    async with _served(disk, directory) as session:
        await _back_up_under_load(session, directory, backup)
    _say("The server has stopped. Is the backup the disk as it was when the backup began?")
    _tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", reference, backup)
    print("Yes: identical, every byte.")
    _say("And the disk itself has gone on meanwhile; it must differ now, and be sound:")
    _tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", reference, disk, expect=1)
    _tool("qemu-img", "check", "-f", "qcow2", disk)
    print(_NEXT)
    return 0


_NEXT = f"""
What next:
  {PROGRAM} serve disk.qcow2                  serve a disk of your own
  {PROGRAM} job start backup device=sda target=/backups/sda.qcow2 sync=full --watch
  {PROGRAM} qmp                               a QMP shell
  {PROGRAM} --help                            everything else"""


def _make_chain(directory: Path) -> None:
    """Base, middle and top; each covers a part of what is below it."""
    below: Path | None = None
    third = SIZE_MIB // 3
    for number, name in enumerate(("base", "middle", "disk")):
        path = directory / f"{name}.qcow2"
        backing: list[str | Path] = ["-b", below, "-F", "qcow2"] if below else []
        _tool("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, f"{SIZE_MIB}M")
        start = number * third // 2
        _tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P {number + 1} {start}M {third * 3 // 2}M", path)
        below = path


def _show_chain(disk: Path) -> None:
    _command(PROGRAM, "chain", disk)
    sys.stdout.flush()
    subprocess.run(_ours("chain", disk), check=True)


@asynccontextmanager
async def _served(disk: Path, directory: Path) -> AsyncIterator[Session]:
    """`serve` as a child; stopped in good order, or a failure."""
    from ._qmp import connected

    command = _ours(
        "serve", disk, "--nbd", f"unix:{directory / 'nbd.sock'}", "--qmp", f"unix:{directory / 'qmp.sock'}"
    )
    _command(PROGRAM, *command[3:])
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert server.stdout is not None  # a pipe was asked for
        try:
            first = await asyncio.wait_for(server.stdout.readline(), START_SECONDS)
        except TimeoutError:
            raise CliError(f"the server was not ready within {START_SECONDS:g} s") from None
        if not first:
            raise CliError("the server did not start, for the reason above")
        print(f"  {first.decode().rstrip()}")
        async with connected(str(directory / "qmp.sock")) as session:
            yield session
        server.send_signal(signal.SIGTERM)
        if await server.wait() != 0:
            raise CliError(f"the server ended with status {server.returncode}")
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()


async def _back_up_under_load(session: Session, directory: Path, backup: Path) -> None:
    _say("Start a backup over QMP, and from the next moment on let fio write all over the disk:")
    arguments = {
        "job-id": "backup0",
        "device": "sda",
        "target": str(backup),
        "format": "qcow2",
        "sync": "full",
        "speed": BACKUP_SPEED,
    }
    _command(PROGRAM, "qmp", "drive-backup", *(f"{key}={value}" for key, value in arguments.items()))
    async with session.job_events() as events:
        await session.execute("drive-backup", arguments)
        fio = await _start_fio(directory)
        try:
            status = await follow_job(session, "backup0", events)
            output, _ = await fio.communicate()
        finally:
            if fio.returncode is None:
                fio.kill()
                await fio.wait()
    if status != 0 or fio.returncode != 0:
        raise CliError(f"the {'backup' if status else 'writing'} failed:\n{output.decode(errors='replace')}")
    print(f"  fio meanwhile: {_fio_summary(output.decode())}")


async def _start_fio(directory: Path) -> asyncio.subprocess.Process:
    command = [
        "fio", "--name=guest", "--ioengine=nbd", f"--uri=nbd+unix:///sda?socket={directory / 'nbd.sock'}",
        "--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={SIZE_MIB}M", "--time_based",
        f"--runtime={WRITE_SECONDS}", "--output-format=terse", "--terse-version=3",
    ]  # fmt: skip
    _command(*command)
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=directory)


def _fio_summary(terse: str) -> str:
    """Writes in all and by the second, from fio's semicolon-separated line (version 3)."""
    for line in terse.splitlines():
        fields = line.split(";")
        if fields[0] == "3" and len(fields) > 48:
            written, iops = int(fields[46]) * 1024, int(fields[48])
            return f"{_format.size(written)} written, {iops} writes a second"
    return "no figures"


# ---- telling and doing ----


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _command(*words: str | Path) -> None:
    print(f"  $ {shlex.join(map(str, words))}", flush=True)


def _ours(*words: str | Path) -> list[str]:
    """One of our own commands, run by this interpreter whatever PATH says."""
    return [
        sys.executable,
        "-c",
        "import sys; from nbd_backend.cli import main; sys.exit(main())",
        *map(str, words),
    ]


def _tool(*words: str | Path, expect: int = 0) -> None:
    """Run a tool that has to exit with `expect`; raises CliError with what it printed."""
    _command(*words)
    started = time.monotonic()
    command: Sequence[str] = [str(word) for word in words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != expect:
        raise CliError(f"`{shlex.join(command)}` exited with {done.returncode} after"
                       f" {time.monotonic() - started:.1f} s: {done.stdout}{done.stderr}")  # fmt: skip


if __name__ == "__main__":
    from . import main

    sys.exit(main(["demo", *sys.argv[1:]]))
