"""The schema is QAPI's: complete, closed under reference, and of the form that clients parse."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nbd_backend.control.arguments import Arguments, Size
from nbd_backend.control.context import Context
from nbd_backend.control.events import Event
from nbd_backend.control.registry import Registry, command
from nbd_backend.control.schema import introspect
from tests.support.control import registry_of

Entry = dict[str, Any]
BUILTINS = {"string", "number", "int", "boolean", "null", "object", "array", "value"}


class Node(Arguments, frozen=True):
    node_name: str
    read_only: bool = False


class FileNode(Node, frozen=True, kw_only=True, tag_field="driver", tag="file"):
    filename: str


class RawNode(Node, frozen=True, kw_only=True, tag_field="driver", tag="raw"):
    file: Annotated[str | FileNode | RawNode | EmptyNode, Meta(title="BlockdevRef")]
    offset: Size = 0


class EmptyNode(Node, frozen=True, kw_only=True, tag_field="driver", tag="null-co"):
    pass


class Result(msgspec.Struct):
    kind: Literal["a", "b"]
    ratio: float
    backing: str | None
    extra: Any = None
    sizes: tuple[int, ...] = ()


def sample_registry() -> Registry:
    @command("blockdev-add", arguments=FileNode | RawNode | EmptyNode, since="1", features=("unstable",))
    async def add(context: Context, arguments: object) -> None: ...

    @command("query-things", returns=list[Result], since="1", oob=True)
    async def query(context: Context, arguments: None) -> list[Result]:
        return []

    return registry_of(add=add, query=query, event=Event("THING", Node, since="1"))


def check_schema(entries: list[Entry]) -> dict[str, Entry]:
    """Assert the form of every entry and that every reference leads somewhere; the entries by name."""
    by_name = {entry["name"]: entry for entry in entries}
    assert len(by_name) == len(entries)
    for entry in entries:
        globals()[f"check_{entry['meta-type']}"](entry, by_name)
    return by_name


def _keys(entry: Entry, required: set[str], optional: frozenset[str] = frozenset()) -> None:
    assert required | {"name", "meta-type"} <= set(entry) <= required | optional | {"name", "meta-type"}


def check_builtin(entry: Entry, by_name: dict[str, Entry]) -> None:
    _keys(entry, {"json-type"})
    assert entry["json-type"] in BUILTINS


def check_enum(entry: Entry, by_name: dict[str, Entry]) -> None:
    _keys(entry, {"members", "values"})
    assert [member["name"] for member in entry["members"]] == entry["values"]


def check_array(entry: Entry, by_name: dict[str, Entry]) -> None:
    _keys(entry, {"element-type"})
    assert entry["name"] == f"[{entry['element-type']}]"
    assert entry["element-type"] in by_name


def check_alternate(entry: Entry, by_name: dict[str, Entry]) -> None:
    _keys(entry, {"members"})
    assert len(entry["members"]) > 1
    for member in entry["members"]:
        assert by_name[member["type"]]["meta-type"] != "alternate"


def check_object(entry: Entry, by_name: dict[str, Entry]) -> None:
    _keys(entry, {"members"}, frozenset({"tag", "variants"}))
    members = {member["name"]: member for member in entry["members"]}
    for member in members.values():
        assert member["type"] in by_name
        assert set(member) <= {"name", "type", "default"}
        assert member.get("default") is None
    if "tag" in entry:
        tag = by_name[members[entry["tag"]]["type"]]
        assert [variant["case"] for variant in entry["variants"]] == tag["values"]
        assert all(by_name[variant["type"]]["meta-type"] == "object" for variant in entry["variants"])


def check_command(entry: Entry, by_name: dict[str, Entry]) -> None:
    _keys(entry, {"arg-type", "ret-type"}, frozenset({"allow-oob", "features"}))
    assert by_name[entry["arg-type"]]["meta-type"] == "object"
    assert entry["ret-type"] in by_name


def check_event(entry: Entry, by_name: dict[str, Entry]) -> None:
    _keys(entry, {"arg-type"})
    assert by_name[entry["arg-type"]]["meta-type"] == "object"


def test_the_schema_of_the_server_is_closed_and_complete() -> None:
    registry = Registry.discover()
    by_name = check_schema(introspect(registry))
    assert set(registry.commands) == {
        name for name, entry in by_name.items() if entry["meta-type"] == "command"
    }
    assert set(registry.events) == {name for name, entry in by_name.items() if entry["meta-type"] == "event"}


def test_a_union_shows_its_tag_its_shared_members_and_its_variants() -> None:
    by_name = check_schema(introspect(sample_registry()))
    union = by_name[by_name["blockdev-add"]["arg-type"]]
    assert union["tag"] == "driver"
    assert [member["name"] for member in union["members"]] == ["driver", "node-name", "read-only"]
    assert "default" not in union["members"][1]
    assert union["members"][2] == {"name": "read-only", "type": "bool", "default": None}
    variants = {variant["case"]: by_name[variant["type"]]["members"] for variant in union["variants"]}
    assert variants["file"] == [{"name": "filename", "type": "str"}]
    assert variants["null-co"] == []


def test_a_recursive_type_refers_to_itself() -> None:
    by_name = check_schema(introspect(sample_registry()))
    union = by_name["blockdev-add"]["arg-type"]
    raw = next(variant for variant in by_name[union]["variants"] if variant["case"] == "raw")
    reference = next(member for member in by_name[raw["type"]]["members"] if member["name"] == "file")
    assert by_name[reference["type"]]["members"] == [{"type": "str"}, {"type": union}]


def test_results_are_described_too() -> None:
    by_name = check_schema(introspect(sample_registry()))
    result = by_name[by_name[by_name["query-things"]["ret-type"]]["element-type"]]
    types = {member["name"]: member["type"] for member in result["members"]}
    assert by_name[types["kind"]]["values"] == ["a", "b"]
    assert (types["ratio"], types["extra"], types["sizes"]) == ("number", "any", "[int]")
    assert by_name[types["backing"]]["members"] == [{"type": "str"}, {"type": "null"}]


def test_flags_of_commands_are_shown_where_they_hold() -> None:
    by_name = check_schema(introspect(sample_registry()))
    assert by_name["query-things"]["allow-oob"] is True
    assert by_name["blockdev-add"]["features"] == ["unstable"]
    assert "allow-oob" not in by_name["blockdev-add"]


def test_an_event_has_its_data() -> None:
    by_name = check_schema(introspect(sample_registry()))
    members = by_name[by_name["THING"]["arg-type"]]["members"]
    assert [member["name"] for member in members] == ["node-name", "read-only"]
