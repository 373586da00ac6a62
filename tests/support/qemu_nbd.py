"""qemu-nbd as a reference server on a unix socket."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.images import CommandError

DEADLINE = 20.0
"""Seconds that it may take to listen."""


@contextmanager
def qemu_nbd(image: Path, at: Path, *, read_only: bool = False, fmt: str = "qcow2") -> Iterator[Path]:
    """The socket `at`, on which a qemu-nbd serves `image`; it has ended, and written everything, on exit."""
    mode = ["-r"] if read_only else ["--discard=unmap"]
    process = subprocess.Popen(
        ["qemu-nbd", "--persistent", "--shared=4", *mode, "-f", fmt, "-k", str(at), str(image)],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        _await(process, at)
        yield at
    finally:
        process.terminate()
        process.communicate()


def _await(process: subprocess.Popen[bytes], at: Path) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(at)) == 0:
                return
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise CommandError(f"qemu-nbd does not listen: {process.communicate()[1].decode()}")
        time.sleep(0.005)
