"""Requests that must fail, the error that the client sees, and that the connection goes on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.datapath.conftest import MIB, Serve
from tests.support import images
from tests.support.nbd_client import Command, Flag, NbdClient, NbdError
from tests.support.server import ServerError


def refused(request: Callable[[], object]) -> str:
    """The name of the error that the request gets."""
    with pytest.raises(NbdError) as error:
        request()
    return error.value.name


def test_reads_beyond_the_end_are_invalid(client: NbdClient) -> None:
    assert refused(lambda: client.read(client.size, 1)) == "EINVAL"
    assert refused(lambda: client.read(client.size - 1, 2)) == "EINVAL"
    assert refused(lambda: client.read((1 << 64) - 512, 512)) == "EINVAL"
    assert refused(lambda: client.block_status(client.size, 512)) == "EINVAL"
    assert client.read(client.size - 1, 1) == b"\0"


def test_writes_beyond_the_end_change_nothing(client: NbdClient) -> None:
    end = client.size
    for request in (
        lambda: client.write(end - 1, b"xx"),
        lambda: client.zero(end - 1, 2),
        lambda: client.trim(end, 512),
        lambda: client.write(1 << 40, b"x"),
    ):
        assert refused(request) in ("EINVAL", "ENOSPC")
    assert client.read(end - 512, 512) == bytes(512)


def test_unknown_flags_and_commands_are_invalid(client: NbdClient) -> None:
    unknown = client.submit(99, 0, 512)
    assert refused(lambda: client.wait(unknown)) == "EINVAL"
    assert refused(lambda: client.read(0, 512, flags=Flag.NO_HOLE)) == "EINVAL"
    assert client.read(0, 512) == bytes(512)


def test_a_read_only_export_refuses_what_would_change_it(serve: Serve, disk: Path) -> None:
    before = disk.read_bytes()
    with serve(disk, options=["--read-only"]) as server, NbdClient(server.nbd_path) as client:
        assert refused(lambda: client.write(0, b"x")) == "EPERM"
        assert refused(lambda: client.zero(0, 512)) == "EPERM"
        assert refused(lambda: client.trim(0, 512)) == "EPERM"
        client.flush()
        assert client.read(0, 512) == bytes(512)
    assert disk.read_bytes() == before


def faulty(image: Path, rules: Sequence[dict[str, object]]) -> list[str]:
    """Options for a raw export "sda" of `image` with fault injection."""
    node = {
        "driver": "error-inject", "node-name": "sda", "rules": list(rules),
        "file": {"driver": "raw", "file": {"driver": "file", "filename": str(image)}},
    }  # fmt: skip
    export = {"type": "nbd", "id": "sda", "node-name": "sda", "name": "sda", "writable": True}
    return ["--blockdev", json.dumps(node), "--export", json.dumps(export)]


@pytest.mark.parametrize(
    ("errno", "seen"),
    [("EIO", "EIO"), ("ENOSPC", "ENOSPC"), ("EROFS", "EPERM"), ("ENOMEM", "ENOMEM"), ("ETIMEDOUT", "EIO"),
     ("ECONNRESET", "EIO"), ("EUCLEAN", "EIO"), ("EDQUOT", "ENOSPC"), ("EFBIG", "ENOSPC")],
)  # fmt: skip
def test_the_storage_error_reaches_the_client(serve: Serve, tmp_path: Path, errno: str, seen: str) -> None:
    image = images.create(tmp_path / "disk.raw", MIB, fmt="raw")
    rules: list[dict[str, object]] = [
        {"operations": ["read", "write", "discard"], "errno": errno, "offset": 4096, "length": 512},
        {"operations": ["flush"], "errno": errno, "count": 1},
    ]
    with serve(options=faulty(image, rules)) as server, NbdClient(server.nbd_path) as client:
        assert refused(lambda: client.read(4000, 1000)) == seen
        assert refused(lambda: client.write(4500, b"x")) == seen
        assert refused(lambda: client.flush()) == seen
        client.write(0, b"y")
        assert client.read(0, 1) == b"y"


def test_one_failed_request_of_many_fails_alone(serve: Serve, tmp_path: Path) -> None:
    image = images.create(tmp_path / "disk.raw", MIB, fmt="raw")
    rules = [{"operations": ["read"], "errno": "EIO", "offset": 40 * 4096, "length": 4096, "count": 1}]
    with serve(options=faulty(image, rules)) as server, NbdClient(server.nbd_path) as client:
        cookies = [client.submit(Command.READ, number * 4096, 4096) for number in range(100)]
        failed = []
        for number, cookie in enumerate(cookies):
            try:
                client.wait(cookie)
            except NbdError as error:
                failed.append((number, error.name))
        assert failed == [(40, "EIO")]


def test_a_vanished_remote_disk_is_an_io_error_and_no_clean_end(serve: Serve, tmp_path: Path) -> None:
    socket = tmp_path / "remote.sock"
    with subprocess.Popen(["nbdkit", "-U", socket, "-P", tmp_path / "pid", "-f", "memory", "1M"]) as remote:
        try:
            while not (tmp_path / "pid").exists():
                assert remote.poll() is None
            node = {"driver": "nbd", "node-name": "sda", "server": {"type": "unix", "path": str(socket)}}
            export = {"type": "nbd", "id": "sda", "node-name": "sda", "name": "sda", "writable": True}
            options = ["--blockdev", json.dumps(node), "--export", json.dumps(export)]
            with pytest.raises(ServerError, match=r"(?s)exited with 1.*Could not flush node 'sda'"):
                lose_remote_disk(serve, options, remote)
        finally:
            remote.kill()


def lose_remote_disk(serve: Serve, options: Sequence[str], remote: subprocess.Popen[bytes]) -> None:
    """Use a disk whose server is killed meanwhile."""
    with serve(options=options) as server, NbdClient(server.nbd_path) as client:
        client.write(1000, b"over there", flags=Flag.FUA)
        assert client.read(1000, 10) == b"over there"
        assert len(client.map()) == 2
        remote.kill()
        remote.wait()
        assert refused(lambda: client.read(0, 512)) == "EIO"
        assert refused(lambda: client.write(0, b"x")) == "EIO"
