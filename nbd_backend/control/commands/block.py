"""Commands about block nodes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from nbd_backend.block.describe import describe_node
from nbd_backend.block.driver import Driver
from nbd_backend.block.drivers import discover
from nbd_backend.block.errors import BlockError, Kind
from nbd_backend.control.arguments import Arguments, Size
from nbd_backend.control.context import Context
from nbd_backend.control.errors import GenericError, QMPError, to_qmp_error
from nbd_backend.control.registry import command

__all__ = ["BlockDeviceInfo", "BlockdevOptions", "ImageInfo", "NodeName", "QueryNodes"]

# Texts that clients know are left exactly as they know them; to our own we add what to do.
_OWN_TEXTS = {Kind.DENIED, Kind.UNSUPPORTED, Kind.BAD_IMAGE}


@to_qmp_error.register
def _(failure: BlockError) -> QMPError:
    if failure.hint and failure.kind in _OWN_TEXTS:
        return GenericError(f"{failure.message} ({failure.hint})")
    return GenericError(failure.message)


def _variant(name: str, driver: Driver) -> type[msgspec.Struct]:
    """The driver's options as a branch of the union that blockdev-add takes, told by `driver`."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(driver.options):
        if field.name != "driver":
            given = (field.default,) if field.default is not msgspec.NODEFAULT else ()
            fields.append((field.name, field.type, *given))
    return msgspec.defstruct(
        f"Blockdev_{name}",
        fields,
        tag_field="driver",
        tag=name,
        rename="kebab",
        kw_only=True,
        frozen=True,
        forbid_unknown_fields=True,
        omit_defaults=True,
    )


def _options_type() -> Any:
    variants = [_variant(name, driver) for name, driver in discover().items()]
    union: Any = variants[0]
    for variant in variants[1:]:
        union = union | variant
    return union


BlockdevOptions: Any = _options_type()
"""The union of all drivers' options: found, like the drivers, so that a new driver is only a new file."""


class NodeName(Arguments, frozen=True):
    """A node."""

    node_name: str


class QueryNodes(Arguments, frozen=True):
    """``flat``: tell each node's image without the images below it."""

    flat: bool = False


class ImageInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """An image; sizes in bytes."""

    filename: str
    format: str
    virtual_size: Size
    actual_size: Size | UnsetType = UNSET
    dirty_flag: bool | UnsetType = UNSET
    cluster_size: Size | UnsetType = UNSET
    backing_filename: str | UnsetType = UNSET
    full_backing_filename: str | UnsetType = UNSET
    backing_filename_format: str | UnsetType = UNSET
    backing_image: ImageInfo | UnsetType = UNSET
    format_specific: Annotated[Any, msgspec.Meta(description="type and data")] = UNSET


class CacheInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """How a node is cached."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockDeviceInfo(msgspec.Struct, frozen=True):
    """A node."""

    file: str
    ro: bool
    drv: str
    backing_file_depth: int
    encrypted: bool
    detect_zeroes: Literal["off", "on", "unmap"]
    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    image: ImageInfo
    cache: CacheInfo
    write_threshold: int
    node_name: str | UnsetType = msgspec.field(default=UNSET, name="node-name")
    backing_file: str | UnsetType = UNSET


@command("blockdev-add", arguments=BlockdevOptions, since="2.9")
async def blockdev_add(context: Context, arguments: msgspec.Struct) -> None:
    """Open a node with its children, or nothing at all."""
    options: dict[str, Any] = msgspec.to_builtins(arguments)
    await context.graph.add(options)


@command("blockdev-del", arguments=NodeName, since="2.9")
async def blockdev_del(context: Context, arguments: NodeName) -> None:
    """Flush and close a node that nobody uses, with the children that only it uses.

    When the flush fails (its server is gone, its disk is full) the node stays, and the error says that what
    was written last may be lost. That is said once: the next blockdev-del removes the node even if its flush
    fails again, as does the first one for the target of a backup that failed or was cancelled.
    """
    await context.graph.remove(arguments.node_name)


@command("query-named-block-nodes", arguments=QueryNodes, returns=list[BlockDeviceInfo], since="2.0")
async def query_named_block_nodes(context: Context, arguments: QueryNodes) -> list[dict[str, Any]]:
    """Every node, newest first."""
    return [describe_node(node, flat=arguments.flat) for node in context.graph.nodes()]


@command("query-block", returns=list[dict[str, Any]], since="0.14")
async def query_block(context: Context, arguments: None) -> list[dict[str, Any]]:
    """The guest's devices: there are none in this process, only nodes and exports."""
    return []
