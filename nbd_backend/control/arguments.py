"""Argument structs: how commands declare what they take, and the errors for what does not fit.

Decoding is msgspec's. Only when it refuses are the values walked once more, in the order of the declaration,
to find the first error and to word it as clients know it: ``Parameter 'file.filename' is missing``.

    str, bool, float, Enum, Literal, list, struct    as they are
    Int64, Uint32, Size, Positive                    integers; a plain ``int`` has no bounds: never use it
    X | UnsetType = UNSET, or any default            an optional member; null is not accepted for it
    X | None                                         null is a value of its own
    A | B, structs with ``tag_field`` and ``tag``    a union: the tag decides
    Annotated[str | A, Meta(title="BlockdevRef")]    an alternate: the JSON type decides; the title names it
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta
from msgspec.inspect import (
    AnyType,
    BoolType,
    DictType,
    EnumType,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    Metadata,
    NoneType,
    StrType,
    StructType,
    Type,
    UnionType,
    VarTupleType,
    type_info,
)

from nbd_backend.control.errors import GenericError

__all__ = ["Arguments", "Int64", "NoArguments", "Positive", "Size", "Uint32", "decode_arguments", "explain"]

INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
UINT32_MAX: Final = 2**32 - 1

Int64 = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
Uint32 = Annotated[int, Meta(ge=0, le=UINT32_MAX)]
Size = Annotated[int, Meta(ge=0, le=INT64_MAX)]  # bytes; more than a file can have is refused
Positive = Annotated[int, Meta(ge=1, le=INT64_MAX)]

_T = TypeVar("_T")


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Base of argument structs: kebab-case names on the wire, unknown members refused.

    ``kw_only`` is not inherited: a subclass that has required members behind optional ones repeats it.
    """


class NoArguments(Arguments, frozen=True):
    """For a command that takes none."""


def decode_arguments(decoder: msgspec.json.Decoder[_T], text: bytes) -> _T:
    """``text``, a JSON object, as the decoder's type. Raises GenericError that names the first error."""
    try:
        return decoder.decode(text)
    except RecursionError:
        raise GenericError("JSON nesting depth limit exceeded") from None
    except msgspec.MsgspecError as error:
        explain(decoder.type, text)
        # Only a constraint that `explain` does not know leads here, such as a pattern: msgspec names it.
        raise GenericError(f"Invalid arguments: {error}") from None


def explain(declared: Any, text: bytes) -> None:
    """Raise GenericError for the first thing in ``text`` that ``declared`` does not allow."""
    try:
        _check(type_info(declared), msgspec.json.decode(text), "")
    except RecursionError:
        raise GenericError("JSON nesting depth limit exceeded") from None
    except (
        msgspec.DecodeError
    ):  # the scanner lets only valid JSON through; what is left is a number like 1e400
        raise GenericError("JSON parse error, number out of range") from None


_NAMES: Final[dict[type[Type], str]] = {
    StrType: "string",
    EnumType: "string",
    LiteralType: "string",
    BoolType: "boolean",
    IntType: "integer",
    FloatType: "number",
    NoneType: "null",
    ListType: "array",
    VarTupleType: "array",
    DictType: "object",
    StructType: "object",
}
_PYTHON: Final[dict[str, type | tuple[type, ...]]] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
    "array": list,
    "object": dict,
}


def _fits(kind: Type, value: object) -> bool:
    """Whether ``value`` has the JSON type that ``kind`` has."""
    name = _NAMES[type(kind)]
    return isinstance(value, _PYTHON[name]) and (name == "boolean" or not isinstance(value, bool))


def _invalid(path: str, expected: str) -> GenericError:
    return GenericError(f"Invalid parameter type for '{path}', expected: {expected}")


def _member(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check(kind: Type, value: Any, path: str) -> None:
    title = None
    if isinstance(kind, Metadata):
        title = (kind.extra_json_schema or {}).get("title")
        kind = kind.type
    if isinstance(kind, AnyType):
        return
    if isinstance(kind, UnionType):
        _check_union(kind, value, path, title)
        return
    if not _fits(kind, value):
        raise _invalid(path, title or _NAMES[type(kind)])
    _check_content(kind, value, path)


def _check_content(kind: Type, value: Any, path: str) -> None:
    """Check a value whose JSON type is right."""
    match kind:
        case StructType():
            _check_struct(kind, value, path)
        case EnumType() | LiteralType():
            _check_choice(choices(kind), value, path)
        case IntType():
            _check_range(kind, value, path)
        case ListType() | VarTupleType():
            for index, item in enumerate(value):
                _check(kind.item_type, item, f"{path}[{index}]")
        case DictType():
            for name, item in value.items():
                _check(kind.value_type, item, _member(path, name))
        case _:
            pass


def choices(kind: EnumType | LiteralType) -> list[str]:
    """The values of an enumeration, in the order of their declaration."""
    if isinstance(kind, EnumType):
        return [str(member.value) for member in kind.cls]
    return [str(value) for value in kind.values]


def _check_choice(allowed: Iterable[str], value: str, path: str) -> None:
    if value not in allowed:
        # Clients know this text with the bare name of a member, however deep it is.
        raise GenericError(f"Parameter '{path.rpartition('.')[2]}' does not accept value '{value}'")


def _check_range(kind: IntType, value: int, path: str) -> None:
    low = INT64_MIN if kind.ge is None else kind.ge
    high = INT64_MAX if kind.le is None else kind.le
    if low <= value <= high:
        return
    if not INT64_MIN <= value <= INT64_MAX:
        raise _invalid(path, "integer")
    if (low, high) == (0, UINT32_MAX):
        raise GenericError(f"Parameter '{path}' expects uint32_t")
    if value < low and (low, high) == (0, INT64_MAX):
        raise GenericError(f"Parameter '{path}' expects a non-negative value")
    if value < low and (low, high) == (1, INT64_MAX):
        raise GenericError(f"Parameter '{path}' expects a >0 value")
    raise GenericError(f"Parameter '{path}' expects a value in range [{low}, {high}]")


def _check_struct(kind: StructType, value: dict[str, Any], path: str) -> None:
    known = {kind.tag_field}
    if kind.tag_field is not None:
        _check_tag(kind.tag_field, [str(kind.tag)], value, path)
    for field in kind.fields:
        known.add(field.encode_name)
        name = _member(path, field.encode_name)
        if field.encode_name in value:
            _check(field.type, value[field.encode_name], name)
        elif field.required:
            raise GenericError(f"Parameter '{name}' is missing")
    for name in value:
        if kind.forbid_unknown_fields and name not in known:
            raise GenericError(f"Parameter '{_member(path, name)}' is unexpected")


def _check_tag(field: str, tags: list[str], value: dict[str, Any], path: str) -> None:
    name = _member(path, field)
    if field not in value:
        raise GenericError(f"Parameter '{name}' is missing")
    if not isinstance(value[field], str):
        raise _invalid(name, "string")
    _check_choice(tags, value[field], name)


def _check_union(kind: UnionType, value: Any, path: str, title: str | None) -> None:
    tagged = [branch for branch in kind.types if isinstance(branch, StructType) and branch.tag]
    branches = {str(branch.tag): branch for branch in tagged}
    if isinstance(value, dict) and branches:
        field = tagged[0].tag_field
        assert field is not None  # a struct with a tag has a field for it
        _check_tag(field, list(branches), value, path)
        _check_struct(branches[value[field]], value, path)
        return
    plain = [option.type if isinstance(option, Metadata) else option for option in kind.types]
    for option in plain:
        if _fits(option, value):
            _check(option, value, path)
            return
    names = dict.fromkeys(_NAMES[type(option)] for option in plain)
    raise _invalid(path, title or " or ".join(names))
