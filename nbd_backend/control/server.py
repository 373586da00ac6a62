"""The QMP server: listening sockets, and a session per connection. For asyncio's own loop and for uvloop."""

from __future__ import annotations

import asyncio
import socket
from typing import Final, cast

from nbd_backend.control.context import Context
from nbd_backend.control.session import Session
from nbd_backend.sockets import listen

__all__ = ["QMPServer"]

CLOSE_TIMEOUT: Final = 1.0  # seconds that clients have for reading what was sent before the end


class _Connection(asyncio.Protocol):
    """Passes on what the transport tells to a session."""

    def __init__(self, server: QMPServer) -> None:
        self._server = server
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        assert self._session is not None  # the loop calls connection_made first
        return self._session

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._session = self._server.begin(cast("asyncio.Transport", transport))

    def data_received(self, data: bytes) -> None:
        self.session.receive(data)

    def eof_received(self) -> bool:
        self.session.finish()
        return True  # the session closes when it has answered

    def pause_writing(self) -> None:
        self.session.pause_writing()

    def resume_writing(self) -> None:
        self.session.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.session.lost()


class QMPServer:
    """Serves monitors, any number at once, until `close`. Loop thread only."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._listeners: list[asyncio.Server] = []
        self._sessions: set[Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    async def listen(self, path: str) -> None:
        """Accept monitors on a new unix socket, that only its owner may connect to (mode 0600).

        A socket that nobody listens on is replaced. Raises AddressError.
        """
        await self.serve(listen(f"unix:{path}"))

    async def serve(self, listener: socket.socket) -> None:
        """Accept monitors on a listening stream socket, which belongs to the server from now on."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        create = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
        self._listeners.append(await create(lambda: _Connection(self), sock=listener))

    @property
    def monitors(self) -> int:
        """How many clients are connected."""
        return len(self._sessions)

    def begin(self, transport: asyncio.Transport) -> Session:
        """A session for a new connection."""
        session = Session(self._context, transport, self._ended)
        self._sessions.add(session)
        self._empty.clear()
        if self._closed:
            session.abort()
        return session

    async def close(self) -> None:
        """Stop listening, cancel the commands that run, and end every monitor. Safe to call twice.

        Clients get what was sent to them if they read it within CLOSE_TIMEOUT.
        """
        self._closed = True
        for server in self._listeners:
            server.close()
        self._listeners.clear()
        tasks = [task for session in self._sessions for task in session.tasks] + list(self._tasks)
        for session in tuple(self._sessions):
            session.close()
        await _cancel(tasks)
        try:
            await asyncio.wait_for(self._empty.wait(), CLOSE_TIMEOUT)
        except TimeoutError:
            for session in tuple(self._sessions):
                session.abort()
            await self._empty.wait()

    def _ended(self, session: Session) -> None:
        self._sessions.discard(session)
        for task in session.tasks:  # commands outlive their monitor, but not the server
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if not self._sessions:
            self._empty.set()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel the tasks other than the caller's, and wait for their ends."""
    others = [task for task in tasks if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
