"""Listening sockets that come and go while nbdkit runs."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.nbd_client import NbdClient
from tests.support.qmp import QmpClient, QmpError
from tests.support.server import NbdBackend, free_port

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 4 MiB."""
    return images.create(tmp_path / "disk.qcow2", 4 * MIB)


def unix(path: Path) -> dict[str, Any]:
    """The argument `addr` for a unix socket."""
    return {"addr": {"type": "unix", "data": {"path": str(path)}}}


def inet(port: int | str, host: str = "127.0.0.1") -> dict[str, Any]:
    """The argument `addr` for a TCP port."""
    return {"addr": {"type": "inet", "data": {"host": host, "port": str(port)}}}


def refused(qmp: QmpClient, command: str, arguments: dict[str, Any] | None = None) -> str:
    """The text of the error that a command must be answered with."""
    with pytest.raises(QmpError) as error:
        qmp.cmd(command, arguments)
    assert error.value.kind == "GenericError"
    return error.value.desc


def said(server: NbdBackend) -> str:
    """What the server printed, but for nbdkit's complaint about clients that only wait for its greeting."""
    lines = server.log().splitlines(keepends=True)
    return "".join(line for line in lines if "reading initial client flags" not in line)


def can_connect(path: Path) -> bool:
    """Whether somebody listens on a unix socket and greets."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        client.settimeout(5)
        return client.recv(8) == b"NBDMAGIC"


def test_listeners_are_added_beside_the_first(image: Path, tmp_path: Path) -> None:
    port = free_port()
    with NbdBackend(image, directory=tmp_path) as server, server.qmp() as qmp:
        qmp.cmd("nbd-server-start", unix(tmp_path / "more.sock"))
        qmp.cmd("nbd-server-start", inet(port))
        for address in (server.nbd_path, tmp_path / "more.sock", ("127.0.0.1", port)):
            with NbdClient(address) as client:
                assert client.size == 4 * MIB
        assert (tmp_path / "more.sock").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "more.sock").exists()


def test_stop_ends_listeners_clients_and_exports(image: Path, tmp_path: Path) -> None:
    server = NbdBackend(image, directory=tmp_path)
    server.start()
    with server.qmp() as qmp:
        qmp.cmd("nbd-server-start", unix(tmp_path / "more.sock"))
        clients = [NbdClient(path) for path in (server.nbd_path, tmp_path / "more.sock")]
        qmp.cmd("nbd-server-stop")
        assert not server.nbd_path.exists()
        assert not (tmp_path / "more.sock").exists()
        assert qmp.cmd("query-block-exports") == []
        qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data["id"] == "sda")
        assert refused(qmp, "nbd-server-stop") == "NBD server not running"
        export = {"type": "nbd", "id": "e", "node-name": "sda"}
        assert refused(qmp, "block-export-add", export) == "NBD server not running"
    for client in clients:
        client.abandon()
    server.stop()
    images.check(image)


def test_stopped_and_started_again_many_times(image: Path, tmp_path: Path) -> None:
    server = NbdBackend(image, directory=tmp_path)
    server.start()
    before = said(server)
    with server.qmp() as qmp:
        for _ in range(20):
            qmp.cmd("nbd-server-stop")
            assert not can_connect(server.nbd_path)
            qmp.cmd("nbd-server-start", unix(server.nbd_path))
            qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "sda", "writable": True})
            with NbdClient(server.nbd_path, "sda") as client:
                client.write(0, b"w" * 512)
    assert said(server) == before, "waking nbdkit must not be heard"
    server.stop()
    images.check(image)


def test_clients_that_keep_knocking_do_not_stall_a_stop(image: Path, tmp_path: Path) -> None:
    """Connections arrive in the moment in which a listener is taken away; nbdkit must not wait on it for
    ever.
    """
    server = NbdBackend(image, directory=tmp_path)
    server.start()
    done = threading.Event()

    def knock() -> None:
        while not done.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                if client.connect_ex(str(server.nbd_path)) == 0:
                    done.wait(0.0002)

    threads = [threading.Thread(target=knock) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with server.qmp() as qmp:
            for _ in range(15):
                qmp.cmd("nbd-server-stop")
                qmp.cmd("nbd-server-start", unix(server.nbd_path))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    server.stop()


def test_as_many_listeners_as_there_are_spares(image: Path, tmp_path: Path) -> None:
    with NbdBackend(image, directory=tmp_path) as server, server.qmp() as qmp:
        for number in range(4):
            qmp.cmd("nbd-server-start", unix(tmp_path / f"{number}.sock"))
        message = refused(qmp, "nbd-server-start", unix(tmp_path / "4.sock"))
        assert message == "all 5 NBD listeners that this process can have are in use: stop them"
        assert not (tmp_path / "4.sock").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (unix(Path("/nonexistent/s")), "cannot listen on unix:/nonexistent/s: No such file or directory"),
        (inet("http"), "'tcp:127.0.0.1:http' is not tcp:HOST:PORT with a port of 0 to 65535"),
        ({"addr": {"type": "inet", "data": {"host": "h"}}}, "Parameter 'addr.data.port' is missing"),
        ({"addr": {"type": "vsock", "data": {}}}, "Parameter 'type' does not accept value 'vsock'"),
        (
            {**unix(Path("/tmp/x")), "max-connections": 5},
            "Parameter 'max-connections' is not supported: leave it out, or give 0 (no limit)",
        ),
    ],
)
def test_listener_that_cannot_be_is_refused_with_the_reason(
    arguments: dict[str, Any], message: str, image: Path, tmp_path: Path
) -> None:
    with NbdBackend(image, directory=tmp_path) as server, server.qmp() as qmp:
        assert refused(qmp, "nbd-server-start", arguments) == message
        assert can_connect(server.nbd_path)


def test_same_address_twice_is_refused_as_clients_know_it(image: Path, tmp_path: Path) -> None:
    with NbdBackend(image, directory=tmp_path) as server, server.qmp() as qmp:
        assert refused(qmp, "nbd-server-start", unix(server.nbd_path)) == "NBD server already running"


def test_private_sockets_leave_no_files(image: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    with (
        NbdBackend(image, directory=tmp_path, environment={"TMPDIR": str(temporary)}) as server,
        server.qmp() as qmp,
    ):
        qmp.cmd("nbd-server-stop")
        assert list(temporary.iterdir()) == []
