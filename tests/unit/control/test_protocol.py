"""Requests are checked as clients know it; replies echo the id as it came."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_backend.control.errors import CommandNotFound, GenericError
from nbd_backend.control.protocol import (
    GREETING,
    Decoder,
    Rejected,
    Request,
    encode_error,
    encode_event,
    encode_return,
)
from nbd_backend.control.scanner import MAX_NESTING


def decode(data: bytes, *, allow_oob: bool = False) -> Request | Rejected:
    decoder = Decoder()
    decoder.feed(data)
    item = decoder.next(allow_oob=allow_oob)
    assert item is not None
    return item


def test_the_greeting_is_one_line_with_version_and_capabilities() -> None:
    greeting = json.loads(GREETING)["QMP"]
    assert GREETING.endswith(b"\r\n")
    assert greeting["capabilities"] == ["oob"]
    assert set(greeting["version"]) == {"qemu", "package"}


def test_a_request_has_its_parts() -> None:
    assert decode(b'{"execute":"x","arguments":{"a": 1},"id":[1]}') == Request("x", b'{"a":1}', b"[1]")


def test_exec_oob_is_a_request_only_when_it_is_enabled() -> None:
    assert decode(b'{"exec-oob":"x"}', allow_oob=True) == Request("x", None, None, oob=True)
    assert _rejection(b'{"exec-oob":"x"}') == "QMP input member 'exec-oob' is unexpected"


def _rejection(data: bytes, *, allow_oob: bool = False) -> str:
    item = decode(data, allow_oob=allow_oob)
    assert isinstance(item, Rejected)
    return item.error.desc


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"[]", "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"execute":1}', "QMP input member 'execute' must be a string"),
        (b'{"exec-oob":1}', "QMP input member 'exec-oob' must be a string"),
        (b'{"execute":"x","arguments":[]}', "QMP input member 'arguments' must be an object"),
        (b'{"execute":"x","foo":1}', "QMP input member 'foo' is unexpected"),
        (b'{"execute":"x","exec-oob":"x"}', "QMP input member 'execute' clashes with 'exec-oob'"),
    ],
)
def test_what_is_no_request_is_rejected_with_the_known_text(data: bytes, error: str) -> None:
    assert _rejection(data, allow_oob=True) == error


def test_a_rejected_request_keeps_its_id() -> None:
    item = decode(b'{"id":5,"foo":1}')
    assert item.id == b"5"


@pytest.mark.parametrize(
    "value", ["1.50", "123456789012345678901234567890", "1e400", '"\\u0000"', "null", '{"a":[]}']
)
def test_an_id_comes_back_as_it_went_in(value: str) -> None:
    item = decode(b'{"execute":"x","id":' + value.encode() + b"}")
    assert encode_return(None, item.id) == b'{"return":{},"id":' + value.encode() + b"}\r\n"


def test_the_deepest_id_that_the_scanner_accepts_is_echoed() -> None:
    depth = MAX_NESTING - 1
    item = decode(b'{"execute":"x","id":' + b"[" * depth + b"]" * depth + b"}")
    assert isinstance(item, Request)
    assert item.id == b"[" * depth + b"]" * depth


def test_an_id_of_several_lines_is_echoed_on_one() -> None:
    item = decode(b'{"execute":"x","id":[\n1,\r\n2]}')
    assert encode_error(CommandNotFound("no"), item.id) == (
        b'{"error":{"class":"CommandNotFound","desc":"no"},"id":[1,2]}\r\n'
    )


def test_an_event_carries_its_time_in_two_parts() -> None:
    assert encode_event("E", {"a": 1}, 1_700_000_000_000_042) == (
        b'{"event":"E","data":{"a":1},"timestamp":{"seconds":1700000000,"microseconds":42}}\r\n'
    )


def test_an_error_without_id_has_none() -> None:
    assert json.loads(encode_error(GenericError("no"), None)) == {
        "error": {"class": "GenericError", "desc": "no"}
    }


@given(st.lists(st.binary(max_size=50), max_size=20), st.booleans())
def test_a_decoder_never_raises(pieces: list[bytes], allow_oob: bool) -> None:
    decoder = Decoder()
    for piece in pieces:
        decoder.feed(piece)
        while decoder.next(allow_oob=allow_oob) is not None:
            pass
