"""Listening sockets: their addresses as text, binding, NBD URIs.

An address is text: ``unix:PATH`` or ``tcp:HOST:PORT`` (an IPv6 host in brackets). Imported by the command
line before anything is served, so it imports little. Any thread.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from urllib.parse import quote

BACKLOG = 128
"""Connections that may wait to be accepted."""
OWNER_ONLY = 0o600
"""Permission of a unix socket: whoever can connect can read and write the disk, or manage the server."""
OWNER_ONLY_DIRECTORY = 0o700
_PATH_LIMIT = 107  # bytes; sun_path without its terminating zero


class AddressError(ValueError):
    """An address that cannot be understood or bound; the text says which, why and what to do."""


def parse_tcp(address: str) -> tuple[str, int]:
    """Host and port of ``tcp:HOST:PORT``; an empty host means every interface. Raises AddressError."""
    host, separator, port = address.removeprefix("tcp:").rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise AddressError(f"'{address}' is not tcp:HOST:PORT with a port of 0 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def unix_path(address: str) -> str | None:
    """The path of ``unix:PATH``, or None for another kind of address."""
    return address.removeprefix("unix:") if address.startswith("unix:") else None


def listen(address: str) -> socket.socket:
    """Bind and listen; the socket blocks and is closed on exec. A stale unix socket is replaced.

    Raises AddressError with the reason: malformed, in use, not permitted.
    """
    path = unix_path(address)
    try:
        if path is not None:
            return _listen_unix(path)
        if address.startswith("tcp:"):
            return _listen_tcp(address)
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror or error}") from error
    raise AddressError(f"'{address}' is neither unix:PATH nor tcp:HOST:PORT")


def bound_address(listener: socket.socket, requested: str) -> str:
    """The address as bound: with the port that the system chose where `requested` asked for port 0."""
    if not requested.startswith("tcp:"):
        return requested
    host, port = listener.getsockname()[:2]
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def describe(listener: socket.socket) -> str:
    """The address of a listening socket that someone else made (systemd)."""
    if listener.family == socket.AF_UNIX:
        name = listener.getsockname()
        return f"unix:{name.decode(errors='replace') if isinstance(name, bytes) else name}"
    return bound_address(listener, "tcp:")


def uri(address: str, export: str = "", *, tls: bool = False) -> str:
    """The NBD URI of an export on an address, as NBD clients take it."""
    scheme, name = ("nbds" if tls else "nbd"), quote(export, safe="")
    path = unix_path(address)
    if path is not None:
        return f"{scheme}+unix:///{name}?socket={quote(path, safe='/')}"
    host, port = parse_tcp(address)
    host = {"": "localhost", "0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{name}"


def private_listener() -> tuple[socket.socket, int]:
    """A listening unix socket that nobody outside this process can reach, and a handle to connect to it by.

    Its name is gone when this returns (an abstract name would be open to every user of the machine); the
    handle is an O_PATH descriptor of the socket, closed on exec, and `handle_path` gives what to connect
    to.
    """
    temporary = os.environ.get("TMPDIR", "/tmp")
    directory = Path(temporary, f"nbd-backend-{os.urandom(8).hex()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory.mkdir(OWNER_ONLY_DIRECTORY)
        try:
            path = directory / "s"
            listener.bind(str(path))
            try:
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            finally:
                path.unlink()
        finally:
            directory.rmdir()
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise AddressError(
            f"cannot make a private socket in {temporary}: {error.strerror or error}"
        ) from error
    return listener, handle


def handle_path(handle: int) -> str:
    """The path by which this process connects to the socket of a `private_listener`."""
    return f"/proc/self/fd/{handle}"


def _listen_unix(path: str) -> socket.socket:
    if len(os.fsencode(path)) > _PATH_LIMIT:
        raise AddressError(
            f"the socket path {path} is longer than {_PATH_LIMIT} bytes: choose a shorter directory"
        )
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        # Before listen(): until then nobody can connect, so no umask, which is the whole process's, is
        # needed.
        Path(path).chmod(OWNER_ONLY)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Unlink a unix socket that nobody listens on; refuse anything else that is in the way."""
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            raise AddressError(f"cannot listen on unix:{path}: a file that is not a socket is in the way")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            probe.connect(path)  # of the wrong type on purpose: whoever listens does not notice
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        Path(path).unlink()
        return
    except OSError as error:
        if error.errno != errno.EPROTOTYPE:
            raise
    raise AddressError(
        f"cannot listen on unix:{path}: another process listens there; stop it or choose another path"
    )


def _listen_tcp(address: str) -> socket.socket:
    host, port = parse_tcp(address)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise AddressError(f"cannot listen on {address}: host '{host}': {error.strerror}") from error
    # "Every interface" should mean both protocols: an IPv6 socket takes IPv4 too.
    family, kind, protocol, _, where = max(found, key=lambda entry: not host and entry[0] == socket.AF_INET6)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not host:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
