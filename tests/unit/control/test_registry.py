"""Commands and events are found where they are implemented, and each is complete."""

from __future__ import annotations

import importlib
import pkgutil
import re
from types import ModuleType

import msgspec
import pytest
from msgspec.inspect import Field, IntType, StructType, Type, UnionType, type_info

from nbd_backend.control import commands
from nbd_backend.control.arguments import Arguments
from nbd_backend.control.context import Context
from nbd_backend.control.errors import GenericError
from nbd_backend.control.registry import Command, Registry, command

registry = Registry.discover()
every_command = pytest.mark.parametrize(
    "subject", registry.commands.values(), ids=lambda subject: subject.name
)


def test_every_module_of_commands_is_found() -> None:
    names = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert "general" in names
    for name in names:
        module = importlib.import_module(f"nbd_backend.control.commands.{name}")
        for value in vars(module).values():
            if isinstance(value, Command):
                assert registry.commands[value.name] is value


def test_two_definitions_of_one_name_are_refused() -> None:
    @command("twice", since="1")
    async def one(context: Context, arguments: None) -> None: ...

    @command("twice", since="1")
    async def other(context: Context, arguments: None) -> None: ...

    module = ModuleType("second")
    vars(module).update(one=one, other=other)
    with pytest.raises(ValueError, match="'twice' is defined twice; the second definition is in second"):
        Registry([module])


def test_an_import_of_a_command_into_another_module_is_no_second_definition() -> None:
    @command("once", since="1")
    async def once(context: Context, arguments: None) -> None: ...

    first, second = ModuleType("first"), ModuleType("second")
    vars(first).update(once=once)
    vars(second).update(once=once)
    assert list(Registry([first, second]).commands) == ["once"]


def test_a_command_without_arguments_refuses_any() -> None:
    with pytest.raises(GenericError, match="Parameter 'x' is unexpected"):
        registry.commands["query-version"].decode(b'{"x":1}')


@every_command
def test_every_command_is_described_and_dated(subject: Command) -> None:
    assert subject.handler.__doc__
    assert subject.since


@every_command
def test_every_argument_is_kebab_case_bounded_and_closed(subject: Command) -> None:
    if subject.arguments is None:
        return
    seen: set[type] = set()
    for struct in _structs(type_info(subject.arguments), seen):
        assert struct.forbid_unknown_fields, struct.cls
        for field in struct.fields:
            _check_field(struct, field)


def _check_field(struct: StructType, field: Field) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9-]*(_[a-z]+)*", field.encode_name), field
    if isinstance(field.type, IntType):
        assert field.type.ge is not None, f"{struct.cls.__name__}.{field.name} has no lower bound"
        assert field.type.le is not None, f"{struct.cls.__name__}.{field.name} has no upper bound"


def _structs(kind: Type, seen: set[type]) -> list[StructType]:
    match kind:
        case UnionType():
            return [struct for option in kind.types for struct in _structs(option, seen)]
        case StructType() if kind.cls not in seen:
            seen.add(kind.cls)
            return [kind, *(struct for field in kind.fields for struct in _structs(field.type, seen))]
    inner = getattr(kind, "item_type", None) or getattr(kind, "type", None)
    return _structs(inner, seen) if isinstance(inner, Type) else []


def test_argument_structs_have_kebab_case_names_on_the_wire() -> None:
    class Names(Arguments, frozen=True):
        node_name: str

    assert msgspec.structs.fields(Names)[0].encode_name == "node-name"
