"""Argument errors are worded as clients know them, whatever msgspec calls them."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Meta, UnsetType

from nbd_backend.control.arguments import Arguments, Int64, Positive, Size, Uint32, decode_arguments, explain
from nbd_backend.control.errors import GenericError


class Discard(Enum):
    IGNORE = "ignore"
    UNMAP = "unmap"


class File(Arguments, frozen=True, tag_field="driver", tag="file"):
    filename: str


class Null(Arguments, frozen=True, tag_field="driver", tag="null-co"):
    size: Size = 0


Ref = Annotated[str | File | Null, Meta(title="BlockdevRef")]


class Everything(Arguments, frozen=True, kw_only=True):
    name: str
    speed: Size = 0
    offset: Int64 = 0
    count: Positive = 1
    granularity: Uint32 = 0
    level: Annotated[int, Meta(ge=1, le=9)] = 1
    read_only: bool = False
    ratio: float = 0.0
    discard: Discard = Discard.IGNORE
    mode: Literal["a", "b"] = "a"
    file: Ref | UnsetType = UNSET
    backing: str | UnsetType | None = UNSET
    children: tuple[Ref, ...] = ()
    numbers: tuple[int, ...] = ()
    options: dict[str, bool] | UnsetType = UNSET
    anything: Any = None
    plain: str | bool = ""


decoder = msgspec.json.Decoder(Everything)


def error_of(text: str) -> str:
    with pytest.raises(GenericError) as caught:
        decode_arguments(decoder, text.encode())
    return caught.value.desc


def test_good_arguments_are_decoded() -> None:
    decoded = decode_arguments(
        decoder, b'{"name":"x","read-only":true,"file":{"driver":"file","filename":"f"}}'
    )
    assert decoded == Everything(name="x", read_only=True, file=File(filename="f"))


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ('"zz":1', "Parameter 'zz' is unexpected"),
        ('"read_only":true', "Parameter 'read_only' is unexpected"),
        ('"speed":"1"', "Invalid parameter type for 'speed', expected: integer"),
        ('"speed":1.0', "Invalid parameter type for 'speed', expected: integer"),
        ('"speed":true', "Invalid parameter type for 'speed', expected: integer"),
        ('"speed":null', "Invalid parameter type for 'speed', expected: integer"),
        ('"speed":99999999999999999999', "Invalid parameter type for 'speed', expected: integer"),
        ('"offset":-9223372036854775809', "Invalid parameter type for 'offset', expected: integer"),
        ('"speed":-1', "Parameter 'speed' expects a non-negative value"),
        ('"count":0', "Parameter 'count' expects a >0 value"),
        ('"granularity":4294967296', "Parameter 'granularity' expects uint32_t"),
        ('"level":10', "Parameter 'level' expects a value in range [1, 9]"),
        ('"read-only":"on"', "Invalid parameter type for 'read-only', expected: boolean"),
        ('"ratio":"x"', "Invalid parameter type for 'ratio', expected: number"),
        ('"ratio":1e400', "JSON parse error, number out of range"),
        ('"discard":"zzz"', "Parameter 'discard' does not accept value 'zzz'"),
        ('"discard":1', "Invalid parameter type for 'discard', expected: string"),
        ('"mode":"c"', "Parameter 'mode' does not accept value 'c'"),
        ('"file":1', "Invalid parameter type for 'file', expected: BlockdevRef"),
        ('"file":null', "Invalid parameter type for 'file', expected: BlockdevRef"),
        ('"file":{}', "Parameter 'file.driver' is missing"),
        ('"file":{"driver":1}', "Invalid parameter type for 'file.driver', expected: string"),
        ('"file":{"driver":"zz"}', "Parameter 'driver' does not accept value 'zz'"),
        ('"file":{"driver":"file"}', "Parameter 'file.filename' is missing"),
        (
            '"file":{"driver":"file","filename":1}',
            "Invalid parameter type for 'file.filename', expected: string",
        ),
        ('"file":{"driver":"file","filename":"f","zz":1}', "Parameter 'file.zz' is unexpected"),
        ('"children":"a"', "Invalid parameter type for 'children', expected: array"),
        ('"children":["a",1]', "Invalid parameter type for 'children[1]', expected: BlockdevRef"),
        ('"children":["a",{"driver":"file"}]', "Parameter 'children[1].filename' is missing"),
        ('"numbers":[1,"a"]', "Invalid parameter type for 'numbers[1]', expected: integer"),
        ('"options":{"a":1}', "Invalid parameter type for 'options.a', expected: boolean"),
        ('"backing":1', "Invalid parameter type for 'backing', expected: string or null"),
        ('"plain":[]', "Invalid parameter type for 'plain', expected: string or boolean"),
        ('"name":1', "Invalid parameter type for 'name', expected: string"),
    ],
)
def test_the_first_error_is_named(members: str, error: str) -> None:
    name = "" if '"name"' in members else '"name":"x",'
    assert error_of(f"{{{name}{members}}}") == error


def test_a_missing_member_comes_before_an_unexpected_one() -> None:
    assert error_of('{"zz":1}') == "Parameter 'name' is missing"


def test_null_is_a_value_where_it_is_declared() -> None:
    assert decode_arguments(decoder, b'{"name":"x","backing":null}').backing is None


def test_a_constraint_without_a_known_text_is_told_in_msgspec_words() -> None:
    class Patterned(Arguments, frozen=True):
        name: Annotated[str, Meta(pattern="^a")]

    with pytest.raises(GenericError, match="Invalid arguments: Expected `str` matching regex"):
        decode_arguments(msgspec.json.Decoder(Patterned), b'{"name":"b"}')


def test_deep_arguments_are_an_error_and_no_crash() -> None:
    deep = "[" * 5000 + "]" * 5000
    assert error_of(f'{{"name":"x","anything":{deep}}}') == "JSON nesting depth limit exceeded"


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
names = st.sampled_from(["driver", "filename", "size", "x"])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["file", "null-co"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner),
    max_leaves=8,
)
members = [field.encode_name for field in msgspec.structs.fields(Everything)]


@given(st.dictionaries(st.sampled_from([*members, "zz"]), values))
def test_the_explanation_and_msgspec_always_agree(given_members: dict[str, object]) -> None:
    text = msgspec.json.encode(given_members)
    try:
        decoder.decode(text)
    except msgspec.MsgspecError:
        with pytest.raises(GenericError):
            explain(Everything, text)
    else:
        if all(-(2**63) <= number < 2**63 for number in _numbers(given_members)):
            explain(Everything, text)


def _numbers(value: object) -> list[int]:
    match value:
        case int():
            return [value]
        case list():
            return [number for item in value for number in _numbers(item)]
        case dict():
            return _numbers(list(value.values()))
    return []
