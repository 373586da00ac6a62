"""One monitor: a client's connection from greeting to end.

    NEGOTIATING ──qmp_capabilities──► READY
         └───────────────┬──────────────┘
                         ▼
                       CLOSED

Requests go into two lanes, in-band and out-of-band. A lane runs its requests one after the other; the lanes
do not wait for each other. Memory is bounded in both directions:

- reading stops while a lane has QUEUE_LENGTH requests waiting, or while the client does not take what is sent
  to it; a message that is being received is bounded by the scanner. Before negotiation one request is in the
  works at most, so that a request behind ``qmp_capabilities`` meets the mode that it brings about.
- replies are made only while the client takes them. Events cannot wait for it: when OUTBOUND_LIMIT bytes are
  unread, the monitor is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

from nbd_backend.control.commands.general import Negotiation
from nbd_backend.control.context import Context
from nbd_backend.control.errors import CommandNotFound, GenericError, to_qmp_error
from nbd_backend.control.protocol import GREETING, Decoder, Rejected, Request, encode_error, encode_return

__all__ = ["OUTBOUND_LIMIT", "QUEUE_LENGTH", "Session", "Transport"]

QUEUE_LENGTH: Final = 8  # requests that wait in one lane
OUTBOUND_LIMIT: Final = 4 << 20  # bytes that may wait for the client to read them when an event comes

_log = logging.getLogger(__name__)


class Transport(Protocol):
    """What a session needs of a connection; asyncio's transports have it."""

    def write(self, data: bytes) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class State(Enum):
    """Where a monitor is in its life."""

    NEGOTIATING = "negotiating"  #: only qmp_capabilities is accepted; no events
    READY = "ready"
    CLOSED = "closed"  #: nothing is sent or accepted any more; a command that runs still ends


class _Lane:
    """Runs requests one after the other, in a task that exists only while there are some."""

    def __init__(self, session: Session) -> None:
        self.waiting: deque[Request | Rejected] = deque()
        self.task: asyncio.Task[None] | None = None
        self._session = session

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return self.task is None and not self.waiting

    def start(self) -> None:
        """Run what waits, unless that happens already."""
        if self.waiting and self.task is None:
            self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self.waiting and self._session.can_send:
                item = self.waiting.popleft()
                self._session.pump()  # there is room for one more: an out-of-band request may be behind it
                await self._session.answer(item)
        finally:
            self.task = None
        # The lane is idle, or the client does not read: `pump` takes more, or ends a finished monitor.
        self._session.pump()


class Session:
    """One monitor. Loop thread only. ``on_end`` is called once, when the connection is gone."""

    def __init__(self, context: Context, transport: Transport, on_end: Callable[[Session], None]) -> None:
        self.state = State.NEGOTIATING
        self._context = context
        self._transport = transport
        self._on_end = on_end
        self._decoder = Decoder()
        self._in_band = _Lane(self)
        self._oob = _Lane(self)
        self._oob_enabled = False
        self._writable = True
        self._reading = True
        self._finished = False  # the client sends nothing any more
        transport.write(GREETING)

    # What the transport tells

    def receive(self, data: bytes) -> None:
        """Take bytes from the client."""
        self._decoder.feed(data)
        self.pump()

    def finish(self) -> None:
        """The client will send no more: answer what it sent, then close."""
        self._finished = True
        self.pump()

    def pause_writing(self) -> None:
        """The client does not read; nothing but events is sent until `resume_writing`."""
        self._writable = False

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writable = True
        self.pump()

    def lost(self) -> None:
        """The connection is gone. A command that runs ends unheard; those that wait are dropped."""
        self._end()
        self._on_end(self)

    # What others ask for

    @property
    def can_send(self) -> bool:
        """Whether the client takes replies now."""
        return self._writable and self.state is not State.CLOSED

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The tasks that run commands at present."""
        return [lane.task for lane in (self._in_band, self._oob) if lane.task is not None]

    def deliver(self, message: bytes) -> None:
        """Send an event; close the monitor if the client has left too much unread."""
        unread = self._transport.get_write_buffer_size()
        if unread + len(message) > OUTBOUND_LIMIT:
            _log.warning("a monitor is closed: its client has left %d bytes unread", unread)
            self.abort()
        else:
            self._transport.write(message)

    def close(self) -> None:
        """End the monitor; what has been sent still reaches the client."""
        self._end()
        self._transport.close()

    def abort(self) -> None:
        """End the monitor at once."""
        self._end()
        self._transport.abort()

    # The machine

    def pump(self) -> None:
        """Take requests as far as the lanes have room, run them, read on or stop reading."""
        exhausted = False
        while self._has_room() and not exhausted:
            item = self._decoder.next(allow_oob=self._oob_enabled)
            if item is None:
                exhausted = True
            else:
                (self._oob if isinstance(item, Request) and item.oob else self._in_band).waiting.append(item)
        if self.can_send:
            self._oob.start()  # its task is the first to run
            self._in_band.start()
        self._read_if(exhausted)
        if exhausted and self._finished and self._in_band.idle and self._oob.idle:
            self.close()

    def _has_room(self) -> bool:
        if not self.can_send:
            return False
        if self.state is State.NEGOTIATING:
            return self._in_band.idle
        return max(len(self._in_band.waiting), len(self._oob.waiting)) < QUEUE_LENGTH

    def _read_if(self, wanted: bool) -> None:
        if self.state is State.CLOSED or self._finished or wanted == self._reading:
            return
        self._reading = wanted
        (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    async def answer(self, item: Request | Rejected) -> None:
        """Run one request and send its reply."""
        try:
            reply = encode_return(await self._execute(item), item.id)
        except Exception as failure:  # each becomes an error reply; the server goes on
            reply = encode_error(to_qmp_error(failure), item.id)
        if self.state is not State.CLOSED:
            self._transport.write(reply)

    async def _execute(self, item: Request | Rejected) -> object:
        if isinstance(item, Rejected):
            raise item.error
        if self.state is State.NEGOTIATING:
            self._negotiate(item)
            return None
        command = self._context.registry.commands.get(item.command)
        if command is None:
            raise CommandNotFound(f"The command {item.command} has not been found")
        if item.oob and not command.oob:
            raise GenericError(f"The command {item.command} does not support OOB")
        return await command(self._context, command.decode(item.arguments))

    def _negotiate(self, request: Request) -> None:
        if request.command != "qmp_capabilities":
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        wanted: Negotiation = self._context.registry.commands["qmp_capabilities"].decode(request.arguments)
        self._oob_enabled = "oob" in wanted.enable
        self.state = State.READY
        self._context.events.subscribe(self)

    def _end(self) -> None:
        self.state = State.CLOSED
        self._context.events.unsubscribe(self)
        self._in_band.waiting.clear()
        self._oob.waiting.clear()
