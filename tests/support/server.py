"""`nbd-backend serve` as a test runs it: started, awaited, and in the end seen to go without a trace."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.qmp import QmpClient

REPOSITORY = Path(__file__).resolve().parents[2]
Address = str | tuple[str, int]
"""The path of a unix socket, or host and port."""
POLL = 0.005
"""Seconds between two looks at something that has no event to wait for."""


def executable() -> Path:
    """The nbd-backend under test: $NBD_BACKEND, else the repository's .venv, else the one on PATH."""
    built = REPOSITORY / ".venv/bin/nbd-backend"
    for candidate in (os.environ.get("NBD_BACKEND"), built, shutil.which("nbd-backend")):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    raise FileNotFoundError("no nbd-backend in .venv/bin or on PATH: run `make build`, or set NBD_BACKEND")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class ServerError(AssertionError):
    """The server did not start, died, or left something behind; the text holds what it printed."""


class NbdBackend:
    """A server process; as a context manager it is stopped cleanly when the block succeeds, else killed.

        with NbdBackend(image, directory=tmp_path) as server, server.qmp() as qmp:
            images.qemu_io(server.uri(), "read 0 4k", fmt="raw")

    `images` are the IMAGE arguments (`path` or `name=path`); the first is the default export. The sockets
    `nbd.sock` and `qmp.sock` and the captured output `server.log` are made in `directory`, whose path must be
    short enough for a unix socket. `tcp_port` adds a TCP listener on 127.0.0.1. `options` are more words of
    the command line, `environment` is added to the inherited one.
    """

    def __init__(
        self,
        *images: str | Path,
        directory: Path,
        options: Sequence[str | Path] = (),
        tcp_port: int | None = None,
        environment: Mapping[str, str] | None = None,
        deadline: float = 20.0,
    ) -> None:
        self.nbd_path = directory / "nbd.sock"
        self.qmp_path = directory / "qmp.sock"
        self.log_path = directory / "server.log"
        self.tcp_port = tcp_port
        self.deadline = deadline
        """Seconds that starting and stopping may each take."""
        tcp = ["--nbd", f"tcp:127.0.0.1:{tcp_port}"] if tcp_port is not None else []
        self.command = [
            str(executable()), "serve", *map(str, images),
            "--nbd", f"unix:{self.nbd_path}", *tcp, "--qmp", f"unix:{self.qmp_path}",
            *map(str, options),
        ]  # fmt: skip
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.kill()
            error.add_note(f"server output:\n{self.log()}")

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running().pid

    def start(self) -> None:
        """Start the server and return once every socket has greeted a client."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        try:
            self._await_ready()
        except BaseException:
            self.kill()
            raise

    def qmp(self) -> QmpClient:
        """A new negotiated monitor session; the caller closes it."""
        return QmpClient(self.qmp_path)

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export on the unix socket; the default export without a name."""
        return f"nbd+unix:///{export}?socket={self.nbd_path}"

    def tcp_uri(self, export: str = "", *, host: str = "127.0.0.1") -> str:
        """The NBD URI of an export on the TCP listener."""
        return f"nbd://{host}:{self.tcp_port}/{export}"

    def log(self) -> str:
        """What the server has written to its standard output and error so far."""
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        """Send SIGTERM and assert a clean end: exit status 0, no child process left, no socket file left."""
        process = self._running()
        process.terminate()
        try:
            status = process.wait(self.deadline)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerError(f"the server ignored SIGTERM for {self.deadline:g} s:\n{self.log()}") from None
        orphans = self._group_alive()
        self.kill()
        if status != 0:
            raise ServerError(f"the server exited with {status} on SIGTERM:\n{self.log()}")
        if orphans:
            raise ServerError(f"the server left child processes behind:\n{self.log()}")
        left = [str(path) for path in (self.nbd_path, self.qmp_path) if path.exists()]
        if left:
            raise ServerError(f"the server left socket files behind: {', '.join(left)}")

    def kill(self) -> None:
        """Kill the server and its children with SIGKILL, as a crash would; nothing when it is not running."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # gone already, the children too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process

    def _group_alive(self) -> bool:
        """Whether any process of the server's session outlives its leader, which has been reaped."""
        try:
            os.killpg(self._running().pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _await_ready(self) -> None:
        end = time.monotonic() + self.deadline
        self._await_greeting(str(self.nbd_path), b"NBDMAGIC", end)
        self._await_greeting(str(self.qmp_path), b'{"QMP"', end)
        if self.tcp_port is not None:
            self._await_greeting(("127.0.0.1", self.tcp_port), b"NBDMAGIC", end)

    def _await_greeting(self, address: Address, greeting: bytes, end: float) -> None:
        """Connect until the greeting's first bytes arrive: a socket that listens is not yet a server."""
        while not _greets(address, greeting, end):
            status = self._running().poll()
            if status is not None:
                raise ServerError(f"`{' '.join(self.command)}` exited with {status}:\n{self.log()}")
            if time.monotonic() > end:
                raise ServerError(f"{address} did not greet within {self.deadline:g} s:\n{self.log()}")
            time.sleep(POLL)


def _greets(address: Address, greeting: bytes, end: float) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        # Short, so that a server which dies with the connection still in its backlog is noticed at once.
        client.settimeout(min(1.0, max(POLL, end - time.monotonic())))
        try:
            client.connect(address)
            return client.recv(len(greeting), socket.MSG_WAITALL) == greeting
        except OSError:
            return False
