"""The scanner finds messages however the stream is cut, and finds its way back after nonsense."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_backend.control import scanner
from nbd_backend.control.errors import GenericError
from nbd_backend.control.scanner import Scanner


def scan(*pieces: bytes) -> list[bytes | str]:
    """What a scanner makes of the pieces: messages, and error texts."""
    subject = Scanner()
    found: list[bytes | str] = []
    for piece in pieces:
        subject.feed(piece)
        found += drain(subject)
    return found


def drain(subject: Scanner) -> list[bytes | str]:
    found: list[bytes | str] = []
    while True:
        try:
            message = subject.next()
        except GenericError as error:
            found.append(error.desc)
            continue
        if message is None:
            return found
        found.append(message)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
json_objects = st.dictionaries(st.text(), json_values)


@given(st.lists(json_objects, max_size=4), st.booleans(), st.booleans())
def test_messages_survive_any_layout(values: list[object], pretty: bool, ascii_only: bool) -> None:
    text = "".join(
        json.dumps(value, indent=2 if pretty else None, ensure_ascii=ascii_only) for value in values
    )
    assert [json.loads(message) for message in scan(text.encode())] == values


symbols = [bytes([byte]) for byte in b"{}[]\"'\\:,1-e.0\xff\n "]
words = [b'{"execute":"query-version"}', b"true", b"null", b'"a"', b"\\u", b"\\ud800"]
noise = st.lists(st.binary(max_size=8) | st.sampled_from(symbols + words), max_size=40).map(b"".join)


@given(noise, st.lists(st.integers(0, 200), max_size=8))
def test_any_cut_of_any_bytes_gives_the_same_result(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(edges)]
    assert scan(*pieces) == scan(data) == scan(*(bytes([byte]) for byte in data))


@given(noise)
def test_a_byte_of_all_ones_brings_any_scanner_back(data: bytes) -> None:
    assert scan(data + b'\xff{"a":1}')[-1] == b'{"a":1}'


@given(noise)
def test_what_is_let_through_is_compact_json(data: bytes) -> None:
    for message in scan(data):
        if isinstance(message, bytes):
            json.loads(message)
            assert b"\n" not in message
            assert b"\r" not in message


def test_single_quotes_and_their_escapes_become_json() -> None:
    assert scan(b"""{'a\\'b"':'\\u00e9\\ud83d\\ude00'}""") == ['{"a\'b\\"":"é😀"}'.encode()]


def test_scalars_are_complete_when_the_next_byte_tells_so() -> None:
    assert scan(b"1", b"2", b" ", b"true", b"\n", b'"x"') == [b"12", b"true", b'"x"']


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'{"a":1,}', "JSON parse error, expecting value"),
        (b"{1:2}", "JSON parse error, key is not a string in object"),
        (b'{"a"}', "JSON parse error, missing : in object pair"),
        (b'{"a":1 "b":2}', "JSON parse error, expected separator in dict"),
        (b"[1 2]", "JSON parse error, expected separator in list"),
        (b'{"a":1,"\\u0061":2}', "JSON parse error, duplicate key"),
        (b'{"a":nul}', "JSON parse error, invalid keyword 'nul'"),
        (b'{"a":"\\x"}', "JSON parse error, invalid escape sequence in string"),
        (b'{"a":"\\ud800"}', "JSON parse error, \\ud800 is not a valid Unicode character"),
        (b'{"a":"\\u12"}', "JSON parse error, \\u12 is not a valid Unicode character"),
        (b'{"a":"\x80"}', "JSON parse error, invalid UTF-8 sequence in string"),
        (b"}", "JSON parse error, expecting value"),
        (b'{"a":1]', "JSON parse error, expected separator in dict"),
    ],
)
def test_a_bad_message_is_one_error_and_the_next_is_read(text: bytes, error: str) -> None:
    assert scan(text + b'{"b":1}') == [error, b'{"b":1}']


def test_an_error_text_repeats_only_the_beginning_of_a_bad_token() -> None:
    (error,) = scan(b'"' + b"a" * 1000 + b"\x01")
    assert isinstance(error, str)
    assert len(error) < 120


def test_nesting_up_to_the_limit_is_accepted() -> None:
    limit = scanner.MAX_NESTING
    assert scan(b"[" * limit + b"]" * limit) == [b"[" * limit + b"]" * limit]


def test_deeper_nesting_is_an_error_and_the_next_message_is_read() -> None:
    assert scan(b"[" * (scanner.MAX_NESTING + 1) + b'{"a":1}') == [
        "JSON nesting depth limit exceeded",
        b'{"a":1}',
    ]


def test_too_many_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanner, "MAX_TOKENS", 10)
    assert scan(b"[1,1,1,1,1", b',{"a":1}') == ["JSON token count limit exceeded", b'{"a":1}']


def test_the_size_limit_counts_a_whole_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanner, "MAX_SIZE", 20)
    assert scan(b'["aaaaaaaa","aaaaaaaa"', b'{"a":1}') == ["JSON token size limit exceeded", b'{"a":1}']


def test_an_endless_token_is_an_error_and_costs_no_more_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scanner, "MAX_SIZE", 1000)
    endless = [b'{"a":"', *[b"a" * 100] * 50]
    assert scan(*endless) == ["JSON token size limit exceeded"]
    assert scan(*endless, b'"\n{"b":1}') == ["JSON token size limit exceeded", b'{"b":1}']


def test_nothing_is_kept_of_a_message_that_is_known_to_be_bad() -> None:
    subject = Scanner()
    subject.feed(b"[1 2" + b',"key"' * 1000)
    assert drain(subject) == []
    assert len(subject._message.text) == 0
