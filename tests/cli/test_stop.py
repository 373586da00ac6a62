"""The end of a server: bounded, complete, and quiet, whatever the clients do."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.support import images
from tests.support.nbd_client import Command, NbdClient
from tests.support.server import NbdBackend

MIB = 1 << 20
SECONDS = 5.0
"""What a stop may take on a loaded machine; alone it takes a tenth of a second."""


@pytest.fixture(params=["filter", "fallback"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Both ways of running."""
    return {"NBD_BACKEND_NO_FILTER": "" if request.param == "filter" else "1"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An overlay, so that writes allocate."""
    base = images.create(tmp_path / "base.qcow2", 64 * MIB)
    return images.create(tmp_path / "disk.qcow2", backing=base)


def said(server: NbdBackend) -> str:
    """What the server printed, but for nbdkit's complaint about the client that only waits for its
    greeting.
    """
    lines = server.log().splitlines(keepends=True)
    return "".join(line for line in lines if "reading initial client flags" not in line)


def stop_and_check(server: NbdBackend, image: Path) -> None:
    """Stop within SECONDS; the image is sound and not a word was said."""
    before = said(server)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < SECONDS
    assert said(server) == before
    images.check(image)


def await_end(server: NbdBackend) -> int:
    """The exit status of a server that ends within SECONDS by itself; it is left for `server` to reap."""
    pidfd = os.pidfd_open(server.pid)
    try:
        assert select.select([pidfd], [], [], SECONDS)[0], f"still alive after {SECONDS} s:\n{server.log()}"
        end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        assert end is not None  # it has exited
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    finally:
        os.close(pidfd)
        server.kill()


def test_idle_clients_do_not_hold_it_up(image: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    server = NbdBackend(image, directory=tmp_path, environment=environment)
    server.start()
    clients = [NbdClient(server.nbd_path) for _ in range(3)]
    clients[0].write(0, b"x" * 4096)
    stop_and_check(server, image)
    for client in clients:
        client.abandon()
    images.qemu_io(image, "read -P 0x78 0 4k")


def test_client_that_never_negotiates_does_not_hold_it_up(image: Path, tmp_path: Path) -> None:
    server = NbdBackend(image, directory=tmp_path)
    server.start()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(server.nbd_path))
        silent.recv(18)
        stop_and_check(server, image)


def test_what_was_acknowledged_to_busy_clients_is_there(
    image: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    server = NbdBackend(image, directory=tmp_path, environment=environment)
    server.start()
    acknowledged = [0, 0]
    writing = threading.Barrier(3)

    def write(which: int) -> None:
        client = NbdClient(server.nbd_path)
        try:
            for number in range(1024):
                client.write((which * 1024 + number) * 16384, bytes([1 + which]) * 16384)
                acknowledged[which] += 1
                if number == 8:
                    writing.wait()
        except Exception:  # the server went, as it should
            client.abandon()

    threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    writing.wait()
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < SECONDS
    for thread in threads:
        thread.join()
    images.check(image)
    for which, count in enumerate(acknowledged):
        assert count > 8
        images.qemu_io(image, f"read -P {1 + which} {which * 1024 * 16384} {count * 16384}", read_only=True)


def test_client_that_does_not_take_its_replies_is_cut_off(image: Path, tmp_path: Path) -> None:
    server = NbdBackend(image, directory=tmp_path, deadline=30)
    server.start()
    client = NbdClient(server.nbd_path)
    for _ in range(8):
        client.submit(Command.READ, 0, 8 * MIB)
    server.stop()
    client.abandon()
    images.check(image)


def test_quit_is_answered_and_ends_the_server(image: Path, tmp_path: Path) -> None:
    server = NbdBackend(image, directory=tmp_path)
    server.start()
    client = NbdClient(server.nbd_path)
    client.write(0, b"z" * 65536)
    with server.qmp() as qmp:
        assert qmp.cmd("quit") == {}
    assert await_end(server) == 0
    client.abandon()
    assert not server.nbd_path.exists()
    assert not server.qmp_path.exists()
    images.check(image)
    images.qemu_io(image, "read -P 0x7a 0 64k", read_only=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_other_signals_stop_it_as_well(number: signal.Signals, image: Path, tmp_path: Path) -> None:
    server = NbdBackend(image, directory=tmp_path)
    server.start()
    os.kill(server.pid, number)
    assert await_end(server) == 0
    images.check(image)


def test_somebody_elses_socket_of_the_same_name_stays(image: Path, tmp_path: Path) -> None:
    server = NbdBackend(image, directory=tmp_path)
    server.start()
    server.nbd_path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(server.nbd_path))
    os.kill(server.pid, signal.SIGTERM)
    assert await_end(server) == 0
    assert server.nbd_path.exists()
