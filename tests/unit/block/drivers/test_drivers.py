"""The drivers: found by themselves, and what each makes of its options."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd_backend.block.drivers import discover
from nbd_backend.block.drivers.nbd import InetServer, UnixServer, uri_of
from nbd_backend.block.errors import BlockError, KernelError
from tests.unit.block.graphs import MIB, new_graph, null
from tests.unit.jobs.loops import both_loops


def test_every_module_is_a_driver() -> None:
    names = {"error-inject", "file", "host_device", "nbd", "null-aio", "null-co", "qcow2", "raw"}
    assert set(discover()) >= names
    assert all(name in driver.names for name, driver in discover().items())


@both_loops
async def test_rules_of_error_inject_act_on_their_operation_and_range() -> None:
    rules = [{"operations": ["write"], "offset": 4096, "length": 4096, "errno": "ENOSPC", "skip": 1}]
    async with new_graph() as graph:
        options = {"driver": "error-inject", "node-name": "n", "file": null("inner"), "rules": rules}
        node = (await graph.add(options)).handle
        node.pwrite(b"x" * 512, 0)
        node.pwrite(b"x" * 512, 4096)
        with pytest.raises(KernelError) as failed:
            node.pwrite(b"x" * 512, 4096)
        assert failed.value.errno == errno.ENOSPC
        node.pread(512, 4096)


@pytest.mark.parametrize("name", ["ENOTHING", "error", "errorcode"])
@both_loops
async def test_an_unknown_errno_is_refused(name: str) -> None:
    rules = [{"operations": ["read"], "errno": name}]
    async with new_graph() as graph:
        with pytest.raises(BlockError, match=f"Parameter 'errno' does not accept value '{name}'"):
            await graph.add({"driver": "error-inject", "node-name": "n", "file": null("i"), "rules": rules})
        assert graph.nodes() == []


def test_uri_of_an_nbd_server() -> None:
    assert uri_of(UnixServer("/run/a b"), "x/y") == "nbd+unix:///x%2Fy?socket=/run/a%20b"
    assert uri_of(InetServer("::1", "10809"), "") == "nbd://[::1]:10809/"
    assert uri_of(InetServer("host", "1"), "disk") == "nbd://host:1/disk"


@pytest.fixture
def pattern_server(tmp_path: Path) -> Iterator[Path]:
    """The socket of an nbdkit that serves 1 MiB in which every 8 bytes hold their own offset."""
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [
            "bash",
            "-c",
            f"LISTEN_PID=$$ LISTEN_FDS=1 exec nbdkit -f pattern 1M 3<&{listener.fileno()}",
        ]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()])
    try:
        yield path
    finally:
        server.terminate()
        server.wait(20)


@both_loops
async def test_an_nbd_export_is_a_node(pattern_server: Path) -> None:
    async with new_graph() as graph:
        where = {"type": "unix", "path": str(pattern_server)}
        node = await graph.add({"driver": "nbd", "node-name": "n", "server": where, "read-only": True})
        assert node.size == MIB
        assert node.handle.pread(16, 8) == (8).to_bytes(8, "big") + (16).to_bytes(8, "big")


@both_loops
async def test_an_nbd_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with new_graph() as graph:
        where = {"type": "unix", "path": str(tmp_path / "gone")}
        with pytest.raises(KernelError) as failed:
            await graph.add({"driver": "nbd", "node-name": "n", "server": where})
    assert failed.value.message.startswith(f"Could not open 'nbd+unix:///?socket={tmp_path}/gone'")
    assert failed.value.hint
