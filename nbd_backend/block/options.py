"""Options of block nodes as blockdev-add takes them: what every driver has, and their conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from nbd_backend.block.errors import BlockError, Kind

NodeRef = str | dict[str, Any]
"""A child: the name of a node, or the options of a new one."""


class CacheOptions(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """`direct`: no page cache. `no_flush`: flushes do nothing. None: as the parent has it."""

    direct: bool | None = None
    no_flush: bool | None = None


class NodeOptions(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What every driver takes."""

    driver: str
    node_name: str | None = None
    read_only: bool | None = None
    auto_read_only: bool = False
    force_share: bool | None = None
    discard: Literal["ignore", "unmap"] | None = None
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    cache: CacheOptions = CacheOptions()


Options = TypeVar("Options", bound=NodeOptions)

_AT = re.compile(r"(?P<text>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_FIELD = re.compile(r"`([^`]*)`")
_TYPES = {
    "str": "string",
    "int": "integer",
    "bool": "boolean",
    "float": "number",
    "object | str": "BlockdevRef",
    "str | object": "BlockdevRef",
}


def convert(raw: Mapping[str, Any], kind: type[Options], prefix: str = "") -> Options:
    """Options as a struct; raises BlockError with QEMU's text and the member's full name below `prefix`."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise BlockError(Kind.INVALID, _explain(str(error), raw, prefix)) from None


def _explain(text: str, raw: Mapping[str, Any], prefix: str) -> str:
    match = _AT.fullmatch(text)
    problem, path = (match["text"], match["path"] or "") if match else (text, "")
    names = _FIELD.findall(problem)
    if problem.startswith("Object missing required field"):
        return f"Parameter '{_join(prefix, path, names[0])}' is missing"
    if problem.startswith("Object contains unknown field"):
        return f"Parameter '{_join(prefix, path, names[0])}' is unexpected"
    where = _join(prefix, path)
    if problem.startswith("Invalid enum value"):
        return f"Parameter '{where}' does not accept value '{_value_at(raw, path)}'"
    if problem.startswith("Expected `") and len(names) > 1:
        return f"Invalid parameter type for '{where}', expected: {_type_name(names[0])}"
    return f"Invalid parameter '{where}': {problem}"


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _value_at(raw: Mapping[str, Any], path: str) -> object:
    value: Any = raw
    for step in path.split("."):
        value = value[step]
    return value


def _type_name(wanted: str) -> str:
    without_null = wanted.removesuffix(" | null")
    return _TYPES.get(without_null, without_null)
