"""Finds JSON messages in a stream of bytes, however it is cut. No I/O, no recursion, bounded memory.

Two machines, one on top of the other:

- the *lexer* cuts bytes into tokens. A byte that no token can contain gives a stray token; the lexer then
  skips to the next structural character (one of ``[]{}:,``), control character except tab, 0xFE or 0xFF.
  A client that has lost its place sends 0xFF and starts afresh.
- the *framer* counts brackets. A message ends when they balance (or go negative). Its tokens pass a push-down
  automaton on the way, so that the first grammar error is known when the message ends; what is collected
  after an error is only counted. A stray token ends a message at once.

Beyond JSON, strings may stand in single quotes, and ``\\'`` is an escape. What leaves here is plain JSON
without white space and without duplicate keys.

    ``JSON parse error, ...``              the grammar
    ``JSON token size limit exceeded``     one message is longer than MAX_SIZE bytes
    ``JSON token count limit exceeded``    one message has more than MAX_TOKENS tokens
    ``JSON nesting depth limit exceeded``  its brackets are nested deeper than MAX_NESTING
"""

from __future__ import annotations

import re
from enum import Enum, IntEnum, auto
from typing import Final

import msgspec

from nbd_backend.control.errors import GenericError

__all__ = ["MAX_NESTING", "MAX_SIZE", "MAX_TOKENS", "Scanner"]

MAX_SIZE: Final = 4 << 20  # bytes of one message, white space not counted
MAX_TOKENS: Final = 1 << 17
MAX_NESTING: Final = 512  # below what msgspec can decode under Python's default recursion limit
_SHOWN: Final = 64  # bytes of a bad token that an error text repeats


class _Kind(Enum):
    """What a token is; brackets and punctuation have a kind each, so that the grammar compares identities."""

    OPEN_OBJECT = "{"
    CLOSE_OBJECT = "}"
    OPEN_ARRAY = "["
    CLOSE_ARRAY = "]"
    COLON = ":"
    COMMA = ","
    STRING = "string"
    NUMBER = "number"
    KEYWORD = "keyword"
    STRAY = "stray"  # cannot be a token; its last byte is the one that does not fit
    OVERSIZED = "oversized"  # longer than a message may be


class _Lex(IntEnum):
    """Where in a token the lexer is. Integers, because their hash is cheap and tables are keyed by this."""

    START = auto()
    DOUBLE = auto()  # inside "…"
    DOUBLE_ESCAPE = auto()
    SINGLE = auto()  # inside '…'
    SINGLE_ESCAPE = auto()
    KEYWORD = auto()
    MINUS = auto()
    ZERO = auto()
    DIGITS = auto()
    POINT = auto()
    FRACTION = auto()
    EXPONENT = auto()
    EXPONENT_SIGN = auto()
    EXPONENT_DIGITS = auto()
    RECOVERY = auto()
    ERROR = auto()  # never current: marks a byte that makes the token stray


_PUNCTUATION: Final = {ord(kind.value): kind for kind in _Kind if len(kind.value) == 1}
_DIGIT: Final = b"0123456789"
_IN_STRING: Final = bytes(range(0x20, 0xFE))

#: state -> the bytes that leave it unchanged, as many as there are
_RUNS: Final = {
    _Lex.START: re.compile(rb"[ \t\r\n]*"),
    _Lex.DOUBLE: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*'),
    _Lex.SINGLE: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*"),
    _Lex.KEYWORD: re.compile(rb"[a-z]*"),
    _Lex.DIGITS: re.compile(rb"[0-9]*"),
    _Lex.FRACTION: re.compile(rb"[0-9]*"),
    _Lex.EXPONENT_DIGITS: re.compile(rb"[0-9]*"),
    _Lex.RECOVERY: re.compile(rb"[^\x00-\x08\n-\x1f\xfe\xff\[\]{}:,]*"),
}


def _on(*rows: tuple[bytes, _Lex]) -> dict[int, _Lex]:
    return {byte: state for accepted, state in rows for byte in accepted}


_TO_EXPONENT: Final = (b"eE", _Lex.EXPONENT)

#: state -> byte -> next state, where the byte belongs to the token
_STEPS: Final[dict[_Lex, dict[int, _Lex]]] = {
    _Lex.START: _on(
        (b'"', _Lex.DOUBLE),
        (b"'", _Lex.SINGLE),
        (b"-", _Lex.MINUS),
        (b"0", _Lex.ZERO),
        (_DIGIT[1:], _Lex.DIGITS),
        (bytes(range(ord("a"), ord("z") + 1)), _Lex.KEYWORD),
    ),
    _Lex.DOUBLE: _on((b"\\", _Lex.DOUBLE_ESCAPE), (b'"', _Lex.START)),
    _Lex.DOUBLE_ESCAPE: _on((_IN_STRING, _Lex.DOUBLE)),
    _Lex.SINGLE: _on((b"\\", _Lex.SINGLE_ESCAPE), (b"'", _Lex.START)),
    _Lex.SINGLE_ESCAPE: _on((_IN_STRING, _Lex.SINGLE)),
    _Lex.KEYWORD: {},
    _Lex.MINUS: _on((b"0", _Lex.ZERO), (_DIGIT[1:], _Lex.DIGITS)),
    _Lex.ZERO: _on((_DIGIT, _Lex.ERROR), (b".", _Lex.POINT), _TO_EXPONENT),
    _Lex.DIGITS: _on((b".", _Lex.POINT), _TO_EXPONENT),
    _Lex.POINT: _on((_DIGIT, _Lex.FRACTION)),
    _Lex.FRACTION: _on(_TO_EXPONENT),
    _Lex.EXPONENT: _on((b"+-", _Lex.EXPONENT_SIGN), (_DIGIT, _Lex.EXPONENT_DIGITS)),
    _Lex.EXPONENT_SIGN: _on((_DIGIT, _Lex.EXPONENT_DIGITS)),
    _Lex.EXPONENT_DIGITS: {},
    _Lex.RECOVERY: {},
}

#: states in which a byte that does not fit ends a complete token, and is looked at again
_COMPLETE: Final = {
    _Lex.KEYWORD: _Kind.KEYWORD,
    _Lex.ZERO: _Kind.NUMBER,
    _Lex.DIGITS: _Kind.NUMBER,
    _Lex.FRACTION: _Kind.NUMBER,
    _Lex.EXPONENT_DIGITS: _Kind.NUMBER,
}

_Token = tuple[_Kind, bytes]


class _Lexer:
    """Cuts what it is fed into tokens; keeps the beginning of an unfinished one."""

    def __init__(self) -> None:
        self._data = b""
        self._position = 0
        self._state = _Lex.START
        self._token = bytearray()

    def feed(self, data: bytes) -> None:
        """Add bytes behind those not yet consumed."""
        self._data = self._data[self._position :] + data
        self._position = 0

    def next(self) -> _Token | None:
        """The next token, or None when more bytes are needed."""
        while True:
            self._run()
            if len(self._token) > MAX_SIZE:
                return self._emit(_Kind.OVERSIZED, _Lex.RECOVERY)
            if self._position == len(self._data):
                return None
            if token := self._step(self._data[self._position]):
                return token

    def _run(self) -> None:
        """Consume the bytes that do not change the state."""
        if pattern := _RUNS.get(self._state):
            match = pattern.match(self._data, self._position)
            assert match is not None  # each pattern matches the empty string
            if self._state not in (_Lex.START, _Lex.RECOVERY):
                self._token += match.group()
            self._position = match.end()

    def _step(self, byte: int) -> _Token | None:
        state = self._state
        following = _STEPS[state].get(byte)
        if following is None:
            if state is _Lex.RECOVERY:
                self._state = _Lex.START
                return None
            if complete := _COMPLETE.get(state):
                return self._emit(complete)
            following = _Lex.ERROR
        self._position += 1
        self._token.append(byte)
        if state is _Lex.START and (punctuation := _PUNCTUATION.get(byte)):
            return self._emit(punctuation)
        if following is _Lex.ERROR:
            return self._emit(_Kind.STRAY, _Lex.RECOVERY)
        if following is _Lex.START:
            return self._emit(_Kind.STRING)
        self._state = following
        return None

    def _emit(self, kind: _Kind, state: _Lex = _Lex.START) -> _Token:
        text = bytes(self._token)
        self._token.clear()
        self._state = state
        return kind, text


class _Expect(Enum):
    """What the grammar allows next."""

    VALUE = auto()
    VALUE_OR_END = auto()  # behind [
    KEY = auto()
    KEY_OR_END = auto()  # behind {
    COLON = auto()
    COMMA_OR_END = auto()
    NOTHING = auto()  # the message is complete


_VALUES: Final = (_Kind.STRING, _Kind.NUMBER, _Kind.KEYWORD, _Kind.OPEN_OBJECT, _Kind.OPEN_ARRAY)
_KEYWORDS: Final = (b"true", b"false", b"null")


class _Message:
    """One message in the making: its text so far, where in the grammar it is, and its first error."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.error: GenericError | None = None
        self.tokens = 0
        self.size = 0  # bytes
        self.braces = 0
        self.brackets = 0
        self._expect = _Expect.VALUE
        self._keys: list[set[bytes] | None] = []  # per open bracket: the keys of an object, None for an array

    @property
    def balanced(self) -> bool:
        """Whether the brackets say that the message has ended, well or badly."""
        return self.braces < 0 or self.brackets < 0 or not (self.braces or self.brackets)

    def push(self, kind: _Kind, text: bytes) -> None:
        """Count a token; keep it unless the message is already bad. Raises GenericError beyond a limit."""
        self._count(kind, text)
        if self.error is not None:
            return
        try:
            self._accept(kind, text)
        except GenericError as error:
            self.error = error
            self.text.clear()
            self._keys.clear()

    def _count(self, kind: _Kind, text: bytes) -> None:
        self.tokens += 1
        self.size += len(text)
        self.braces += (kind is _Kind.OPEN_OBJECT) - (kind is _Kind.CLOSE_OBJECT)
        self.brackets += (kind is _Kind.OPEN_ARRAY) - (kind is _Kind.CLOSE_ARRAY)
        if self.size > MAX_SIZE:
            raise GenericError("JSON token size limit exceeded")
        if self.tokens > MAX_TOKENS:
            raise GenericError("JSON token count limit exceeded")
        if self.braces + self.brackets > MAX_NESTING:
            raise GenericError("JSON nesting depth limit exceeded")

    def _accept(self, kind: _Kind, text: bytes) -> None:
        match self._expect:
            case _Expect.COLON:
                if kind is not _Kind.COLON:
                    raise _parse_error("missing : in object pair")
                self._expect = _Expect.VALUE
                self.text += text
            case _Expect.COMMA_OR_END:
                self._separator(kind, text)
            case _Expect.KEY_OR_END if kind is _Kind.CLOSE_OBJECT:
                self._close(text)
            case _Expect.VALUE_OR_END if kind is _Kind.CLOSE_ARRAY:
                self._close(text)
            case _Expect.KEY | _Expect.KEY_OR_END:
                self._key(kind, text)
            case _:
                self._value(kind, text)

    def _separator(self, kind: _Kind, text: bytes) -> None:
        in_object = self._keys[-1] is not None
        if kind is _Kind.COMMA:
            self._expect = _Expect.KEY if in_object else _Expect.VALUE
            self.text += text
        elif kind is (_Kind.CLOSE_OBJECT if in_object else _Kind.CLOSE_ARRAY):
            self._close(text)
        else:
            raise _parse_error(f"expected separator in {'dict' if in_object else 'list'}")

    def _key(self, kind: _Kind, text: bytes) -> None:
        if kind is not _Kind.STRING:
            _check_value(kind, text)
            raise _parse_error("key is not a string in object")
        key, keys = _plain_string(text), self._keys[-1]
        assert keys is not None  # a key is expected inside an object only
        if key in keys:
            raise _parse_error("duplicate key")
        keys.add(key)
        self.text += key
        self._expect = _Expect.COLON

    def _value(self, kind: _Kind, text: bytes) -> None:
        _check_value(kind, text)
        if kind is _Kind.OPEN_OBJECT:
            self._keys.append(set())
            self._expect = _Expect.KEY_OR_END
        elif kind is _Kind.OPEN_ARRAY:
            self._keys.append(None)
            self._expect = _Expect.VALUE_OR_END
        else:
            self._value_ends()
        self.text += _plain_string(text) if kind is _Kind.STRING else text

    def _close(self, text: bytes) -> None:
        self._keys.pop()
        self.text += text
        self._value_ends()

    def _value_ends(self) -> None:
        self._expect = _Expect.COMMA_OR_END if self._keys else _Expect.NOTHING


class Scanner:
    """Bytes in, messages out. Pulling, not pushing, so that the caller decides how far to read ahead."""

    def __init__(self) -> None:
        self._lexer = _Lexer()
        self._message = _Message()

    def feed(self, data: bytes) -> None:
        """Add received bytes. The scanner keeps them until `next` has consumed them."""
        self._lexer.feed(data)

    def next(self) -> bytes | None:
        """The next message as compact JSON (any value), or None when more bytes are needed.

        Raises GenericError for a message that is bad; the next call goes on behind it.
        """
        while token := self._lexer.next():
            if (text := self._push(*token)) is not None:
                return text
        return None

    def _push(self, kind: _Kind, text: bytes) -> bytes | None:
        message = self._message
        try:
            if kind is _Kind.STRAY:
                raise _parse_error(f"stray '{_shown(text)}'")
            if kind is _Kind.OVERSIZED:
                raise GenericError("JSON token size limit exceeded")
            message.push(kind, text)
        except GenericError:
            self._message = _Message()
            raise
        if not message.balanced:
            return None
        self._message = _Message()
        if message.error is not None:
            raise message.error
        return bytes(message.text)


def _parse_error(text: str) -> GenericError:
    return GenericError(f"JSON parse error, {text}")


def _shown(text: bytes) -> str:
    """A bad token for an error text."""
    return text[:_SHOWN].decode(errors="replace") + ("…" if len(text) > _SHOWN else "")


def _check_value(kind: _Kind, text: bytes) -> None:
    """Raise GenericError unless the token is a value or begins one."""
    if kind not in _VALUES:
        raise _parse_error("expecting value")
    if kind is _Kind.KEYWORD and text not in _KEYWORDS:
        raise _parse_error(f"invalid keyword '{_shown(text)}'")


_ESCAPE: Final = re.compile(
    r"\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL
)
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"} | {char: char for char in "\"'\\/"}


def _plain_string(text: bytes) -> bytes:
    """A string token as a JSON string. Raises GenericError for bad UTF-8 and bad escapes."""
    if text[0] == ord('"') and b"\\" not in text and text.isascii():
        return text
    try:
        body = text[1:-1].decode()
    except UnicodeDecodeError:
        raise _parse_error("invalid UTF-8 sequence in string") from None
    return msgspec.json.encode(_ESCAPE.sub(_unescape, body))


def _unescape(match: re.Match[str]) -> str:
    high, low, single, char = match.groups()
    if high:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
    if single and not 0xD800 <= int(single, 16) <= 0xDFFF:
        return chr(int(single, 16))
    if single or char == "u":
        sequence = match.string[match.start() : match.start() + 6]
        raise _parse_error(f"{sequence} is not a valid Unicode character")
    if char not in _ESCAPED:
        raise _parse_error("invalid escape sequence in string")
    return _ESCAPED[char]
