"""Every test of this directory runs twice: with the filter, and with the Python data callbacks instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support import images
from tests.support.nbd_client import NbdClient
from tests.support.server import NbdBackend

MIB = 1 << 20

Serve = Callable[..., AbstractContextManager[NbdBackend]]
"""`serve(*images, options=(), tcp_port=None, clean=…)`: a running server; see the fixture."""


@pytest.fixture(params=["filter", "fallback"])
def native(request: pytest.FixtureRequest) -> bool:
    """Whether nbdkit runs our filter."""
    return bool(request.param == "filter")


@pytest.fixture
def serve(native: bool, tmp_path: Path) -> Serve:
    """Start servers whose end is checked: exit status 0 on SIGTERM, nothing left behind, images sound.

    `clean` names the qcow2 images that `qemu-img check` must find without fault afterwards; by default all
    image arguments, unless another `--format` is given.
    """

    @contextmanager
    def start(
        *arguments: str | Path,
        options: Sequence[str | Path] = (),
        tcp_port: int | None = None,
        clean: Sequence[Path] | None = None,
    ) -> Iterator[NbdBackend]:
        environment = {"NBD_BACKEND_NO_FILTER": "" if native else "1"}
        with NbdBackend(
            *arguments, directory=tmp_path, options=options, tcp_port=tcp_port, environment=environment
        ) as server:
            assert runs_filter(server) == native
            yield server
        if clean is None and "--format" not in options:
            clean = [Path(str(argument).rpartition("=")[2]) for argument in arguments]
        for image in clean or ():
            images.check(image)

    return start


def runs_filter(server: NbdBackend) -> bool:
    """Whether the server process was told to load a filter."""
    words = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")
    return any(word.startswith(b"--filter=") for word in words)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An empty qcow2 image of 8 MiB."""
    return images.create(tmp_path / "disk.qcow2", 8 * MIB)


@pytest.fixture
def client(serve: Serve, disk: Path) -> Iterator[NbdClient]:
    """A client of a server that serves `disk`."""
    with serve(disk) as server, NbdClient(server.nbd_path) as connection:
        yield connection
