"""Listening sockets: addresses, what may be replaced, who may connect."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nbd_backend import sockets
from nbd_backend.sockets import AddressError


def test_unix_socket_is_its_owners_only(tmp_path: Path) -> None:
    with sockets.listen(f"unix:{tmp_path}/s"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    sockets.listen(f"unix:{tmp_path}/s").close()
    with sockets.listen(f"unix:{tmp_path}/s"), socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/s")


def test_socket_of_a_live_server_is_refused_without_disturbing_it(tmp_path: Path) -> None:
    with sockets.listen(f"unix:{tmp_path}/s") as live:
        with pytest.raises(
            AddressError, match="another process listens there; stop it or choose another path"
        ):
            sockets.listen(f"unix:{tmp_path}/s")
        live.setblocking(False)
        with pytest.raises(BlockingIOError):
            live.accept()


def test_file_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(AddressError, match="a file that is not a socket is in the way"):
        sockets.listen(f"unix:{tmp_path}/s")
    assert (tmp_path / "s").read_text() == "precious"


def test_path_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="is longer than 107 bytes"):
        sockets.listen(f"unix:{tmp_path}/{'x' * 120}")


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match=r"cannot listen on unix:.*/nope/s: No such file or directory"):
        sockets.listen(f"unix:{tmp_path}/nope/s")


@pytest.mark.parametrize(
    "address", ["tcp:host", "tcp:host:port", "tcp:host:70000", "tcp:host:-1", "tcp:host:²"]
)
def test_malformed_tcp_address_is_refused(address: str) -> None:
    with pytest.raises(AddressError, match="is not tcp:HOST:PORT"):
        sockets.parse_tcp(address)


def test_unknown_kind_of_address_is_refused() -> None:
    with pytest.raises(AddressError, match="neither unix:PATH nor tcp:HOST:PORT"):
        sockets.listen("vsock:2:10809")


def test_tcp_port_in_use_is_named() -> None:
    with sockets.listen("tcp:127.0.0.1:0") as first:
        address = sockets.bound_address(first, "tcp:127.0.0.1:0")
        with pytest.raises(AddressError, match=f"cannot listen on {address}: Address already in use"):
            sockets.listen(address)


def test_empty_host_listens_on_both_protocols() -> None:
    with sockets.listen("tcp::0") as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            pass
        assert sockets.bound_address(listener, "tcp::0") == f"tcp:[::]:{port}"


@pytest.mark.parametrize(
    ("address", "export", "tls", "uri"),
    [
        ("unix:/run/n.sock", "sda", False, "nbd+unix:///sda?socket=/run/n.sock"),
        ("unix:/a b?c", "x/y z", False, "nbd+unix:///x%2Fy%20z?socket=/a%20b%3Fc"),
        ("tcp:127.0.0.1:10809", "", False, "nbd://127.0.0.1:10809/"),
        ("tcp:[::1]:10809", "sda", True, "nbds://[::1]:10809/sda"),
        ("tcp:[::]:10809", "sda", False, "nbd://localhost:10809/sda"),
    ],
)
def test_uri(address: str, export: str, tls: bool, uri: str) -> None:
    assert sockets.uri(address, export, tls=tls) == uri


def test_private_listener_is_reached_by_its_handle_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    listener, handle = sockets.private_listener()
    try:
        assert list(tmp_path.iterdir()) == []
        assert not listener.getsockname().startswith("\0"), "an abstract name is open to every user"
        with listener, socket.socket(socket.AF_UNIX) as client:
            client.connect(sockets.handle_path(handle))
            listener.accept()[0].close()
    finally:
        os.close(handle)


def test_descriptor_of_somebody_else_is_described(tmp_path: Path) -> None:
    with sockets.listen(f"unix:{tmp_path}/s") as listener:
        assert sockets.describe(listener) == f"unix:{tmp_path}/s"
