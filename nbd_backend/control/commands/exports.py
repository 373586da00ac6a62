"""Commands about exports."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from nbd_backend.block.node import BlockNode
from nbd_backend.control.arguments import Arguments
from nbd_backend.control.context import Context
from nbd_backend.control.errors import GenericError
from nbd_backend.control.registry import command

__all__ = ["ExportInfo", "ExportReference", "NbdExport", "ServerAdd", "ServerRemove"]


class NbdExport(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename="kebab",
    tag_field="type",
    tag="nbd",
):
    """An export over NBD. ``name``: what clients ask for, the node's name without it."""

    id: str
    node_name: str
    writable: bool = False
    writethrough: bool = False
    name: str | UnsetType = UNSET
    description: str = ""
    allocation_depth: bool = False


class ExportReference(Arguments, frozen=True):
    """An export; ``hard`` disconnects its clients, ``safe`` refuses while there are any."""

    id: str
    mode: Literal["safe", "hard"] = "safe"


class ExportInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """An export."""

    id: str
    type: Literal["nbd"]
    node_name: str
    shutting_down: bool


class ServerAdd(Arguments, frozen=True):
    """A node to export under ``name``, which is also the export's id; the node's name without it."""

    device: str
    name: str | UnsetType = UNSET
    description: str = ""
    writable: bool = False


class ServerRemove(Arguments, frozen=True):
    """An export by its id."""

    name: str
    mode: Literal["safe", "hard"] = "safe"


def _require_server(context: Context) -> None:
    if not context.nbd.addresses:
        raise GenericError("NBD server not running")


def _node(context: Context, device: str, name: str) -> BlockNode:
    node = context.graph.find(name)
    if node is None:
        raise GenericError(f"Cannot find device='{device}' nor node-name='{name}'")
    return node


@command("block-export-add", arguments=NbdExport, since="5.2")
async def block_export_add(context: Context, arguments: NbdExport) -> None:
    """Let NBD clients see a node."""
    for member, wanted in (
        ("writethrough", arguments.writethrough),
        ("allocation-depth", arguments.allocation_depth),
    ):
        if wanted:
            raise GenericError(f"Parameter '{member}' is not supported: leave it out")
    _require_server(context)
    context.exports.add(
        arguments.id,
        None if arguments.name is UNSET else arguments.name,
        _node(context, "", arguments.node_name),
        writable=arguments.writable,
        description=arguments.description,
    )


@command("block-export-del", arguments=ExportReference, since="5.2")
async def block_export_del(context: Context, arguments: ExportReference) -> None:
    """Take an export away."""
    await context.exports.remove(arguments.id, arguments.mode)


@command("query-block-exports", returns=list[ExportInfo], since="5.2")
async def query_block_exports(context: Context, arguments: None) -> list[ExportInfo]:
    """Every export."""
    return [msgspec.convert(entry, ExportInfo) for entry in context.exports.listing()]


@command("nbd-server-add", arguments=ServerAdd, since="1.3", features=("deprecated",))
async def nbd_server_add(context: Context, arguments: ServerAdd) -> None:
    """Let NBD clients see a node: what block-export-add does, in the older form."""
    _require_server(context)
    node = _node(context, arguments.device, arguments.device)
    name = node.name if arguments.name is UNSET else arguments.name
    if context.exports.find(name) is not None and name:
        raise GenericError(f"NBD server already has export named '{name}'")
    context.exports.add(
        name,
        name,
        node,
        writable=arguments.writable and not node.read_only,
        description=arguments.description,
    )


@command("nbd-server-remove", arguments=ServerRemove, since="2.12", features=("deprecated",))
async def nbd_server_remove(context: Context, arguments: ServerRemove) -> None:
    """Take an export away: what block-export-del does, in the older form."""
    await context.exports.remove(arguments.name, arguments.mode)
