"""Derives QAPI's introspection from the structs of commands and events.

Each entry is a JSON object with a ``name`` and a ``meta-type``: builtin, enum, object, alternate, array,
command or event. Types refer to each other by name; the names of our own types are numbers, as they mean
nothing to clients (an array of type 5 is ``[5]``). From msgspec's view of a type:

    str bool int float None Any dict    builtin (QAPI has no maps: a dict is ``any``)
    Enum, Literal                       enum
    Struct                              object; a member with a default says so with ``"default": null``
    union of tagged structs             object with ``tag`` and ``variants``; shared members are its own
    union of different JSON types       alternate
    list, tuple                         array
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

import msgspec
from msgspec.inspect import (
    AnyType,
    BoolType,
    DictType,
    EnumType,
    Field,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    Metadata,
    NoneType,
    RawType,
    StrType,
    StructType,
    Type,
    UnionType,
    VarTupleType,
    type_info,
)

from nbd_backend.control.arguments import choices
from nbd_backend.control.events import Event
from nbd_backend.control.registry import Command, Registry

__all__ = ["encoded_schema", "introspect"]

Entry = dict[str, Any]

_BUILTINS: Final = {
    "str": "string",
    "int": "int",
    "number": "number",
    "bool": "boolean",
    "null": "null",
    "any": "value",
}
_BUILTIN_OF: Final[dict[type[Type], str]] = {
    StrType: "str",
    IntType: "int",
    FloatType: "number",
    BoolType: "bool",
    NoneType: "null",
    AnyType: "any",
    RawType: "any",
    DictType: "any",
}
_encoded: dict[Registry, msgspec.Raw] = {}


def introspect(registry: Registry) -> list[Entry]:
    """The schema: commands and events first, then every type that they refer to."""
    types = _Types()
    surface = [_command(types, command) for command in registry.commands.values()]
    surface += [_event(types, event) for event in registry.events.values()]
    return surface + types.entries


def encoded_schema(registry: Registry) -> msgspec.Raw:
    """The schema as JSON, made once per registry."""
    if registry not in _encoded:
        _encoded[registry] = msgspec.Raw(msgspec.json.encode(introspect(registry)))
    return _encoded[registry]


def _command(types: _Types, command: Command) -> Entry:
    entry: Entry = {
        "name": command.name,
        "meta-type": "command",
        "arg-type": types.name_of(command.arguments),
        "ret-type": types.name_of(command.returns),
    }
    if command.oob:
        entry["allow-oob"] = True
    if command.features:
        entry["features"] = list(command.features)
    return entry


def _event(types: _Types, event: Event) -> Entry:
    return {"name": event.name, "meta-type": "event", "arg-type": types.name_of(event.data)}


class _Types:
    """The types met so far: each once, under the name that refers to it."""

    def __init__(self) -> None:
        self.entries: list[Entry] = [
            {"name": name, "meta-type": "builtin", "json-type": json} for name, json in _BUILTINS.items()
        ]
        self._names: dict[Hashable, str] = {}
        self._empty = self._define("empty", "object", members=[])

    def name_of(self, declared: Any) -> str:
        """The name of a type as Python declares it; None is the object without members."""
        return self._empty if declared is None else self._name(type_info(declared))

    def _define(self, key: Hashable, meta_type: str, **content: Any) -> str:
        """The name of the entry for ``key``, made now if there is none."""
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self.entries.append({"name": self._names[key], "meta-type": meta_type, **content})
        return self._names[key]

    def _name(self, kind: Type) -> str:
        match kind:
            case Metadata():
                return self._name(kind.type)
            case StructType():
                return self._union((kind,)) if kind.tag_field else self._object(kind)
            case UnionType():
                return self._alternate(kind)
            case EnumType() | LiteralType():
                return self._enum(choices(kind))
            case ListType() | VarTupleType():
                return self._array(self._name(kind.item_type))
            case _:
                return _BUILTIN_OF[type(kind)]

    def _enum(self, values: list[str]) -> str:
        members = [{"name": value} for value in values]
        return self._define(("enum", tuple(values)), "enum", members=members, values=values)

    def _array(self, element: str) -> str:
        name = f"[{element}]"
        if name not in self._names.values():
            self._names["array", element] = name
            self.entries.append({"name": name, "meta-type": "array", "element-type": element})
        return name

    def _object(self, kind: StructType, without: frozenset[str] = frozenset()) -> str:
        fields = [field for field in kind.fields if field.encode_name not in without]
        if not fields:
            return self._empty
        key = ("object", kind.cls, without)
        if key not in self._names:
            members: list[Entry] = []  # filled afterwards: a member's type may refer to this one
            self._define(key, "object", members=members)
            members += map(self._member, fields)
        return self._names[key]

    def _member(self, field: Field) -> Entry:
        member: Entry = {"name": field.encode_name, "type": self._name(field.type)}
        return member if field.required else member | {"default": None}

    def _alternate(self, kind: UnionType) -> str:
        plain = [option.type if isinstance(option, Metadata) else option for option in kind.types]
        branches = tuple(option for option in plain if isinstance(option, StructType))
        names = [self._name(option) for option in plain if not isinstance(option, StructType)]
        if branches:
            names.append(self._union(branches) if branches[0].tag_field else self._object(branches[0]))
        if len(names) == 1:
            return names[0]
        return self._define(("alternate", *names), "alternate", members=[{"type": name} for name in names])

    def _union(self, branches: tuple[StructType, ...]) -> str:
        key = ("union", *(branch.cls for branch in branches))
        if key in self._names:
            return self._names[key]
        tag = branches[0].tag_field
        shared = [field for field in branches[0].fields if all(field in branch.fields for branch in branches)]
        without = frozenset(field.encode_name for field in shared)
        members: list[Entry] = []
        variants: list[Entry] = []
        name = self._define(key, "object", members=members, tag=tag, variants=variants)
        members.append({"name": tag, "type": self._enum([str(branch.tag) for branch in branches])})
        members += map(self._member, shared)
        variants += [{"case": str(branch.tag), "type": self._object(branch, without)} for branch in branches]
        return name
