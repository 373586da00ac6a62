"""The QMP protocol without I/O: bytes to requests, results and errors to bytes.

A request is ``{"execute": NAME, "arguments": {…}, "id": ANY}``, or ``exec-oob`` in place of ``execute``; a
reply is ``{"return": …}`` or ``{"error": {"class", "desc"}}``, with the request's id as it came. Every
message that the server sends is one line that ends in CRLF.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from nbd_backend.control.errors import GenericError, QMPError
from nbd_backend.control.scanner import Scanner
from nbd_backend.control.version import VERSION

__all__ = ["GREETING", "Decoder", "Rejected", "Request", "encode_error", "encode_event", "encode_return"]

CAPABILITIES: Final = ("oob",)
LINE_END: Final = b"\r\n"
GREETING: Final = msgspec.json.encode({"QMP": {"version": VERSION, "capabilities": CAPABILITIES}}) + LINE_END

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_string = msgspec.json.Decoder(str)


@dataclass(frozen=True, slots=True)
class Request:
    """A command to run. ``arguments`` and ``id`` are compact JSON, None where the client gave none."""

    command: str
    arguments: bytes | None
    id: bytes | None
    oob: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """A message that is no request; answered in its turn like one."""

    error: QMPError
    id: bytes | None = None


class Decoder:
    """Turns received bytes into requests, one at a time and in order."""

    def __init__(self) -> None:
        self._scanner = Scanner()

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._scanner.feed(data)

    def next(self, *, allow_oob: bool) -> Request | Rejected | None:
        """The next request, or None when more bytes are needed. Never raises, whatever the bytes are."""
        try:
            text = self._scanner.next()
        except GenericError as error:
            return Rejected(error)
        return None if text is None else _parse(text, allow_oob)


def _parse(text: bytes, allow_oob: bool) -> Request | Rejected:
    if not text.startswith(b"{"):
        return Rejected(GenericError("QMP input must be a JSON object"))
    members = {name: bytes(value) for name, value in _members.decode(text).items()}
    request_id = members.pop("id", None)
    try:
        return _check(members, request_id, allow_oob)
    except GenericError as error:
        return Rejected(error, request_id)


def _check(members: dict[str, bytes], request_id: bytes | None, allow_oob: bool) -> Request:
    verbs = ("execute", "exec-oob") if allow_oob else ("execute",)
    for name, value in members.items():
        if name == "arguments":
            if not value.startswith(b"{"):
                raise GenericError("QMP input member 'arguments' must be an object")
        elif name not in verbs:
            raise GenericError(f"QMP input member '{name}' is unexpected")
        elif not value.startswith(b'"'):
            raise GenericError(f"QMP input member '{name}' must be a string")
    given = [verb for verb in verbs if verb in members]
    if not given:
        raise GenericError("QMP input lacks member 'execute'")
    if len(given) > 1:
        raise GenericError("QMP input member 'execute' clashes with 'exec-oob'")
    name = _string.decode(members[given[0]])
    return Request(name, members.get("arguments"), request_id, oob=given[0] == "exec-oob")


def encode_return(result: object, request_id: bytes | None) -> bytes:
    """The reply that carries a result; ``{}`` for None. Raises TypeError for what JSON cannot carry."""
    return _reply(b"return", msgspec.json.encode({} if result is None else result), request_id)


def encode_error(error: QMPError, request_id: bytes | None) -> bytes:
    """The reply that carries an error."""
    return _reply(b"error", msgspec.json.encode({"class": error.class_, "desc": error.desc}), request_id)


def encode_event(name: str, data: object, microseconds: int) -> bytes:
    """An event that happened ``microseconds`` after the epoch."""
    seconds, rest = divmod(microseconds, 1_000_000)
    timestamp = {"seconds": seconds, "microseconds": rest}
    return msgspec.json.encode({"event": name, "data": data, "timestamp": timestamp}) + LINE_END


def _reply(kind: bytes, value: bytes, request_id: bytes | None) -> bytes:
    tail = b"" if request_id is None else b',"id":' + request_id
    return b'{"%b":%b%b}%b' % (kind, value, tail, LINE_END)
