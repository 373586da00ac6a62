"""Control of nbdkit's listening sockets while it runs.

nbdkit knows the descriptors it was started with and polls them for ever; it offers no way to add or remove
one. So it is started with spare descriptors too: each holds a private listening socket that nobody can
reach.

    state of a descriptor   start(address)                       stop
    spare                   the new listener takes its place     -
    active                  -                                    a private listener takes its place

A poll in progress goes on watching the sockets that the descriptors named when it began. Therefore each
change is followed by a connection to one more private socket, the waker, whose descriptor never changes:
nbdkit accepts it and polls again, now what the descriptors name. Such a connection says what a client says
that changed its mind (NBD_OPT_ABORT), which nbdkit takes without a word.

One race remains: poll has reported a client on a listener, and the listener is replaced before nbdkit
accepts; its accept then blocks on the private socket. So `stop` connects to that one as well.

Everything here is called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import sockets
from .config import ListenerConfig, SpareConfig

WAKE_SECONDS = 5.0
"""How long nbdkit may take to accept a connection that wakes it; it takes microseconds."""
# The client's flags (fixed newstyle), then option NBD_OPT_ABORT without data.
_CHANGED_MY_MIND = struct.pack(">I", 1) + b"IHAVEOPT" + struct.pack(">II", 2, 0)


@dataclass(frozen=True, slots=True)
class _Listener:
    fd: int
    address: str
    inode: tuple[int, int] | None  # of a unix socket that is ours to unlink


@dataclass(frozen=True, slots=True)
class _Spare:
    fd: int
    handle: int  # sockets.private_listener's


class Listeners:
    """nbdkit's listening sockets: those that serve, and the spare ones."""

    def __init__(self, active: Sequence[ListenerConfig], spares: Sequence[SpareConfig], waker: int) -> None:
        """Take over what the command line bound. `waker` is the handle of the private socket that nbdkit
        polls.
        """
        self._active = [
            _Listener(one["fd"], one["address"], _inode(one["address"]) if one["unlink"] else None)
            for one in active
        ]
        self._spares = [_Spare(one["fd"], one["handle"]) for one in spares]
        self._waker = waker
        self._changing = asyncio.Lock()
        self._names = {_local_name(listener.fd) for listener in self._active} - {None}
        """What accepted sockets are called: of every listener there ever was, as clients outlive listeners.
        """

    @property
    def addresses(self) -> list[str]:
        """Where clients can connect now, oldest first."""
        return [listener.address for listener in self._active]

    async def start(self, address: str) -> None:
        """Listen on a further address until `stop`. Raises AddressError."""
        async with self._changing:
            if address in self.addresses:
                raise sockets.AddressError("NBD server already running")
            if not self._spares:
                raise sockets.AddressError(
                    f"all {len(self._active)} NBD listeners that this process can have are in use: stop them"
                )
            # Off the loop: a host name may have to be resolved.
            listener = await asyncio.get_running_loop().run_in_executor(None, sockets.listen, address)
            with listener:
                bound = sockets.bound_address(listener, address)
                spare = self._spares.pop()
                os.dup2(listener.fileno(), spare.fd, inheritable=False)
            os.close(spare.handle)
            self._active.append(_Listener(spare.fd, bound, _inode(bound)))
            self._names.add(_local_name(spare.fd))
            await self._wake(self._waker)

    async def stop(self) -> None:
        """Stop listening everywhere; clients stay until `disconnect`. AddressError when nothing listens."""
        async with self._changing:
            if not self._active:
                raise sockets.AddressError("NBD server not running")
            replaced = []
            while self._active:
                replaced.append(self._replace_with_private(self._active.pop()))
            await asyncio.gather(self._wake(self._waker), *(self._wake(handle) for handle in replaced))

    def disconnect(self) -> None:
        """Make every client's connection end: nbdkit reads the end of the stream, answers what is in
        flight, closes.

        Only reading is shut down. nbdkit before 1.33.10 aborts when sending fails for two replies at once,
        so what a client does not take is never cut off.
        """
        for client in list(self._connections()):
            with client, suppress(OSError):  # it may have gone by itself
                client.shutdown(socket.SHUT_RD)

    def unlink(self) -> None:
        """Remove the unix sockets' files, at the server's end; someone else's file of the same name stays."""
        for listener in self._active:
            _unlink(listener)

    def _replace_with_private(self, listener: _Listener) -> int:
        private, handle = sockets.private_listener()
        with private:
            os.dup2(private.fileno(), listener.fd, inheritable=False)
        _unlink(listener)
        self._spares.append(_Spare(listener.fd, handle))
        return handle

    def _connections(self) -> Iterator[socket.socket]:
        """A duplicate of every socket that a client of one of the listeners is connected by."""
        ours: set[int] = set()
        for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
            connection = _connected_socket(fd) if fd not in ours else None
            if connection is None:
                continue
            ours.add(connection.fileno())  # it may have the number that listing the directory took
            if _name_of(connection) in self._names:
                yield connection
            else:
                connection.close()

    async def _wake(self, handle: int) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            try:
                async with asyncio.timeout(WAKE_SECONDS):
                    await loop.sock_connect(client, sockets.handle_path(handle))
                    await loop.sock_sendall(client, _CHANGED_MY_MIND)
                    while await loop.sock_recv(client, 64):
                        pass
            except TimeoutError:
                raise sockets.AddressError(
                    f"nbdkit has accepted no connection for {WAKE_SECONDS:g} s"
                ) from None


def _connected_socket(fd: int) -> socket.socket | None:
    """A duplicate of the connected stream socket that `fd` names, or None if it names anything else."""
    try:
        duplicate = os.dup(fd)
    except OSError:  # closed meanwhile
        return None
    try:
        connection = socket.socket(fileno=duplicate)
    except OSError:  # no socket
        os.close(duplicate)
        return None
    try:
        if connection.type == socket.SOCK_STREAM and not _listens(connection):
            return connection
    except OSError:  # not asked of this kind of socket
        pass
    connection.close()
    return None


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _local_name(fd: int) -> object:
    with socket.socket(fileno=os.dup(fd)) as listener:
        return _name_of(listener)


def _name_of(sock: socket.socket) -> object:
    """What an accepted socket has in common with its listener: the path, or the port; None if it has no
    name.
    """
    name = sock.getsockname()
    return name[1] if isinstance(name, tuple) else name or None


def _inode(address: str) -> tuple[int, int] | None:
    path = sockets.unix_path(address)
    if path is None:
        return None
    status = Path(path).lstat()
    return status.st_dev, status.st_ino


def _unlink(listener: _Listener) -> None:
    path = sockets.unix_path(listener.address)
    if path is None or listener.inode is None:
        return
    try:
        if _inode(listener.address) == listener.inode:
            Path(path).unlink()
    except FileNotFoundError:  # someone tidied up already
        pass
