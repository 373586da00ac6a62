"""An NBD client of our own, from the protocol's specification alone: no library smooths anything over.

Newstyle fixed handshake with NBD_OPT_GO, structured replies, base:allocation, every command and flag, any
number of requests in flight. What the server sends is checked: replies to nothing, chunks outside the
request, bytes missing, flags where none may be all raise ProtocolError. All offsets and sizes are bytes. One
thread per client.
"""

import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

Address = Path | tuple[str, int]
"""A unix socket, or host and port."""

BASE_ALLOCATION = "base:allocation"
DEADLINE = 60.0
"""Seconds that the server may be silent while something is awaited."""


class Handshake(IntFlag):
    """Flags of the greeting and of the client's answer."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What may be haggled over before the transmission phase."""

    ABORT = 2
    LIST = 3
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Info(IntEnum):
    """What NBD_REP_INFO tells."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What the server says of an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Flag(IntFlag):
    """Flags of a request."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16


NO_FLAGS = Flag(0)
NO_TRANSMISSION_FLAGS = TransmissionFlag(0)


class State(IntFlag):
    """Flags of a base:allocation extent."""

    HOLE = 1
    ZERO = 2


class Chunk(IntEnum):
    """Types of structured reply chunks."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 32769
    ERROR_OFFSET = 32770


ERRORS = {
    1: "EPERM", 5: "EIO", 12: "ENOMEM", 22: "EINVAL", 28: "ENOSPC",
    75: "EOVERFLOW", 95: "ENOTSUP", 108: "ESHUTDOWN",
}  # fmt: skip
OPTION_ERRORS = {
    1: "ERR_UNSUP", 2: "ERR_POLICY", 3: "ERR_INVALID", 4: "ERR_PLATFORM", 5: "ERR_TLS_REQD",
    6: "ERR_UNKNOWN", 7: "ERR_SHUTDOWN", 8: "ERR_BLOCK_SIZE_REQD", 9: "ERR_TOO_BIG",
}  # fmt: skip

_COMMAND_NAMES = {command.value: command.name for command in Command}
_GREETING = b"NBDMAGICIHAVEOPT"
_OPTION_MAGIC = b"IHAVEOPT"
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REP_ACK, _REP_SERVER, _REP_INFO, _REP_META_CONTEXT = 1, 2, 3, 4
_REP_ERROR = 1 << 31
_REQUEST_MAGIC = 0x25609513
_SIMPLE_MAGIC = 0x67446698
_CHUNK_MAGIC = 0x668E33EF
_CHUNK_DONE = 1


class ProtocolError(AssertionError):
    """The server said something that the specification does not allow."""


class NbdError(Exception):
    """An error reply. `name` is the error's in the specification (EIO, ERR_UNKNOWN), `text` the server's."""

    def __init__(self, what: str, name: str, text: str) -> None:
        super().__init__(f"{what}: {name}{': ' if text else ''}{text}")
        self.name = name
        self.text = text


class Extent(NamedTuple):
    """One run of a block status reply."""

    offset: int
    length: int
    state: State


class ListedExport(NamedTuple):
    """One line of NBD_OPT_LIST."""

    name: str
    description: str


@dataclass
class ExportInfo:
    """What NBD_OPT_GO told of the export."""

    size: int = -1
    flags: TransmissionFlag = NO_TRANSMISSION_FLAGS
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None
    """Minimum, preferred, maximum."""


@dataclass
class Request:
    """A request and what has come of its answer."""

    command: int
    offset: int
    count: int
    data: bytearray = field(default_factory=bytearray)
    missing: int = 0
    extents: list[Extent] = field(default_factory=list)
    error: NbdError | None = None
    done: bool = False


class _Stream:
    """A socket that goes on receiving while it sends, so that neither side waits for the other for ever."""

    def __init__(self, address: Address) -> None:
        if isinstance(address, Path):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.connect(str(address))
        else:
            self._socket = socket.create_connection(address)
        self._socket.setblocking(False)
        self._received = bytearray()

    def send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            readable, writable, _ = select.select([self._socket], [self._socket], [], DEADLINE)
            if readable:
                self._fill()
            elif not writable:
                raise TimeoutError(f"the server has taken nothing for {DEADLINE:g} s")
            else:
                left = left[self._socket.send(left) :]

    def receive(self, count: int) -> bytes:
        while len(self._received) < count:
            if not select.select([self._socket], [], [], DEADLINE)[0]:
                raise TimeoutError(f"the server has sent nothing for {DEADLINE:g} s")
            self._fill()
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _fill(self) -> None:
        data = self._socket.recv(1 << 20)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._received += data

    def close(self) -> None:
        self._socket.close()


class _Negotiation:
    """The option phase of a connection."""

    def __init__(self, address: Address) -> None:
        self.stream = _Stream(address)
        greeting = self.stream.receive(18)
        if greeting[:16] != _GREETING:
            raise ProtocolError(f"greeting is {greeting[:16]!r}")
        flags = Handshake(int.from_bytes(greeting[16:]))
        if flags != Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES:
            raise ProtocolError(f"handshake flags are {flags!r}")
        self.stream.send(struct.pack(">I", flags))

    def option(self, option: Option, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; its replies before the ACK. Raises NbdError for an error reply."""
        self.stream.send(_OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", self.stream.receive(20))
            payload = self.stream.receive(length)
            if magic != _OPTION_REPLY_MAGIC or echoed != option:
                raise ProtocolError(f"reply to option {option!r} has magic {magic:#x}, option {echoed}")
            if kind & _REP_ERROR:
                name = OPTION_ERRORS.get(kind ^ _REP_ERROR, hex(kind))
                raise NbdError(f"option {option.name}", name, payload.decode())
            if kind == _REP_ACK:
                return replies
            replies.append((kind, payload))

    def go(self, export: str) -> ExportInfo:
        name = export.encode()
        wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
        request = struct.pack(">I", len(name)) + name + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
        info = ExportInfo()
        for kind, payload in self.option(Option.GO, request):
            if kind != _REP_INFO:
                raise ProtocolError(f"reply of type {kind} to NBD_OPT_GO")
            _take_info(info, payload)
        if info.size < 0:
            raise ProtocolError("NBD_OPT_GO gave no NBD_INFO_EXPORT")
        return info

    def meta_contexts(self, option: Option, export: str, queries: Sequence[str]) -> dict[int, str]:
        name = export.encode()
        request = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
        for query in queries:
            request += struct.pack(">I", len(query.encode())) + query.encode()
        found: dict[int, str] = {}
        for kind, payload in self.option(option, request):
            if kind != _REP_META_CONTEXT:
                raise ProtocolError(f"reply of type {kind} to {option!r}")
            found[int.from_bytes(payload[:4])] = payload[4:].decode()
        return found


def _take_info(info: ExportInfo, payload: bytes) -> None:
    kind, body = int.from_bytes(payload[:2]), payload[2:]
    if kind == Info.EXPORT:
        size, flags = struct.unpack(">QH", body)
        info.size, info.flags = size, TransmissionFlag(flags)
    elif kind == Info.NAME:
        info.name = body.decode()
    elif kind == Info.DESCRIPTION:
        info.description = body.decode()
    elif kind == Info.BLOCK_SIZE:
        minimum, preferred, maximum = struct.unpack(">III", body)
        info.block_sizes = minimum, preferred, maximum


def list_exports(address: Address) -> list[ListedExport]:
    """What the server lists, in its order."""
    negotiation = _Negotiation(address)
    try:
        listed = []
        for kind, payload in negotiation.option(Option.LIST):
            if kind != _REP_SERVER:
                raise ProtocolError(f"reply of type {kind} to NBD_OPT_LIST")
            length = int.from_bytes(payload[:4])
            listed.append(ListedExport(payload[4 : 4 + length].decode(), payload[4 + length :].decode()))
        negotiation.option(Option.ABORT)
        return listed
    finally:
        negotiation.stream.close()


class NbdClient:
    """A connection in the transmission phase; a context manager that says goodbye.

    The methods named after commands send one request and wait for its answer; `submit` and `wait` apart keep
    several in flight. A failed request raises NbdError.
    """

    def __init__(
        self,
        address: Address,
        export: str = "",
        *,
        structured: bool = True,
        contexts: Sequence[str] = (BASE_ALLOCATION,),
    ) -> None:
        """Connect and choose an export. Without `structured` no meta context can be had."""
        negotiation = _Negotiation(address)
        self._stream = negotiation.stream
        self._pending: dict[int, Request] = {}
        self._last_cookie = 0
        self._structured = structured
        self.contexts: dict[int, str] = {}
        """Names of the meta contexts that the server agreed to, by id."""
        try:
            if structured:
                negotiation.option(Option.STRUCTURED_REPLY)
                if contexts:
                    self.contexts = negotiation.meta_contexts(Option.SET_META_CONTEXT, export, contexts)
            self.info = negotiation.go(export)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Of the export."""
        return self.info.size

    def close(self) -> None:
        """Say goodbye and close the connection."""
        try:
            self._send(Command.DISC, NO_FLAGS, 0, 0, 0, b"")
        except OSError:
            pass  # the server may have gone first
        finally:
            self._stream.close()

    def abandon(self) -> None:
        """Close the connection without a word, as a client that dies."""
        self._stream.close()

    def read(self, offset: int, count: int, *, flags: Flag = NO_FLAGS) -> bytes:
        """`count` bytes at `offset`."""
        return bytes(self.wait(self.submit(Command.READ, offset, count, flags=flags)).data)

    def write(self, offset: int, data: bytes, *, flags: Flag = NO_FLAGS) -> None:
        """Write `data` at `offset`."""
        self.wait(self.submit(Command.WRITE, offset, len(data), data=data, flags=flags))

    def zero(self, offset: int, count: int, *, flags: Flag = NO_FLAGS) -> None:
        """Make a range read as zeroes; NO_HOLE keeps its space allocated."""
        self.wait(self.submit(Command.WRITE_ZEROES, offset, count, flags=flags))

    def trim(self, offset: int, count: int, *, flags: Flag = NO_FLAGS) -> None:
        """Discard a range."""
        self.wait(self.submit(Command.TRIM, offset, count, flags=flags))

    def flush(self) -> None:
        """Make durable what was written."""
        self.wait(self.submit(Command.FLUSH, 0, 0))

    def cache(self, offset: int, count: int) -> None:
        """Prefetch a range."""
        self.wait(self.submit(Command.CACHE, offset, count))

    def block_status(self, offset: int, count: int, *, flags: Flag = NO_FLAGS) -> list[Extent]:
        """The base:allocation extents of one reply; they begin at `offset` and may cover less or more."""
        return self.wait(self.submit(Command.BLOCK_STATUS, offset, count, flags=flags)).extents

    def map(self, offset: int = 0, count: int | None = None) -> list[Extent]:
        """The base:allocation of a whole range (the disk), neighbours that say the same merged."""
        end = self.size if count is None else offset + count
        merged: list[Extent] = []
        while offset < end:
            for extent in self.block_status(offset, min(end - offset, 1 << 30)):
                length = min(extent.length, end - extent.offset)
                if merged and merged[-1].state == extent.state:
                    merged[-1] = merged[-1]._replace(length=merged[-1].length + length)
                elif length:
                    merged.append(extent._replace(length=length))
                offset = extent.offset + length
        return merged

    def submit(
        self, command: int, offset: int, count: int, *, data: bytes = b"", flags: Flag = NO_FLAGS
    ) -> int:
        """Send a request, of any number as its command, without waiting; a cookie for `wait`."""
        self._last_cookie += 1
        reading = count if command == Command.READ else 0
        self._pending[self._last_cookie] = Request(command, offset, count, bytearray(reading), reading)
        self._send(command, flags, self._last_cookie, offset, count, data)
        return self._last_cookie

    def wait(self, cookie: int) -> Request:
        """Wait for the answer to a request; raises NbdError if it failed."""
        pending = self._pending[cookie]
        while not pending.done:
            self._receive_reply()
        del self._pending[cookie]
        if pending.error:
            raise pending.error
        return pending

    def _send(self, command: int, flags: Flag, cookie: int, offset: int, count: int, data: bytes) -> None:
        header = struct.pack(">IHHQQI", _REQUEST_MAGIC, flags, command, cookie, offset, count)
        self._stream.send(header + data)

    def _receive_reply(self) -> None:
        magic = int.from_bytes(self._stream.receive(4))
        if magic == _SIMPLE_MAGIC:
            self._receive_simple()
        elif magic == _CHUNK_MAGIC and self._structured:
            self._receive_chunk()
        else:
            raise ProtocolError(f"reply with magic {magic:#x}")

    def _request(self, cookie: int) -> Request:
        pending = self._pending.get(cookie)
        if pending is None or pending.done:
            raise ProtocolError(f"reply to request {cookie}, which does not wait for one")
        return pending

    def _receive_simple(self) -> None:
        error, cookie = struct.unpack(">IQ", self._stream.receive(12))
        pending = self._request(cookie)
        if pending.command == Command.READ and self._structured:
            raise ProtocolError("simple reply to a read though structured replies were agreed on")
        if error:
            pending.error = _request_error(pending, error, "")
        elif pending.command == Command.READ:
            pending.data[:] = self._stream.receive(pending.count)
        pending.done = True

    def _receive_chunk(self) -> None:
        flags, kind, cookie, length = struct.unpack(">HHQI", self._stream.receive(16))
        pending = self._request(cookie)
        _take_chunk(pending, Chunk(kind), self._stream.receive(length), self.contexts)
        if flags & _CHUNK_DONE:
            pending.done = True
            if pending.missing and not pending.error:
                raise ProtocolError(f"{pending.missing} of {pending.count} bytes read were never sent")


def _name(command: int) -> str:
    return _COMMAND_NAMES.get(command, f"command {command}")


def _request_error(pending: Request, number: int, text: str) -> NbdError:
    what = f"{_name(pending.command)} of {pending.count} at {pending.offset}"
    return NbdError(what, ERRORS.get(number, str(number)), text)


def _take_chunk(pending: Request, kind: Chunk, body: bytes, contexts: dict[int, str]) -> None:
    if kind in (Chunk.ERROR, Chunk.ERROR_OFFSET):
        number, length = struct.unpack(">IH", body[:6])
        pending.error = _request_error(pending, number, body[6 : 6 + length].decode())
    elif kind == Chunk.OFFSET_DATA and pending.command == Command.READ:
        _take_read(pending, int.from_bytes(body[:8]), body[8:])
    elif kind == Chunk.OFFSET_HOLE and pending.command == Command.READ:
        offset, length = struct.unpack(">QI", body)
        _take_read(pending, offset, bytes(length))
    elif kind == Chunk.BLOCK_STATUS and pending.command == Command.BLOCK_STATUS:
        _take_extents(pending, body, contexts)
    elif kind != Chunk.NONE:
        raise ProtocolError(f"chunk of type {kind.name} in the reply to {_name(pending.command)}")


def _take_read(pending: Request, offset: int, data: bytes) -> None:
    start = offset - pending.offset
    if start < 0 or start + len(data) > pending.count or len(data) > pending.missing:
        raise ProtocolError(f"chunk of {len(data)} bytes at {offset} is not of the read at {pending.offset}")
    pending.data[start : start + len(data)] = data
    pending.missing -= len(data)


def _take_extents(pending: Request, body: bytes, contexts: dict[int, str]) -> None:
    if contexts.get(int.from_bytes(body[:4])) != BASE_ALLOCATION or len(body) % 8 != 4:
        raise ProtocolError(f"block status for context {int.from_bytes(body[:4])}, {len(body)} bytes")
    offset = pending.offset
    for length, flags in struct.iter_unpack(">II", body[4:]):
        if length == 0 or flags > State.HOLE | State.ZERO:
            raise ProtocolError(f"block status with length {length}, flags {flags:#x}")
        pending.extents.append(Extent(offset, length, State(flags)))
        offset += length
    if not pending.extents:
        raise ProtocolError("block status without an extent")
