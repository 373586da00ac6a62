"""A window of another node, without any format."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nbd_backend.block import kernel
from nbd_backend.block.driver import Driver, OpenContext, Opened
from nbd_backend.block.errors import BlockError, Kind
from nbd_backend.block.node import FormatInfo
from nbd_backend.block.options import NodeOptions, NodeRef
from nbd_backend.block.units import SECTOR

Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Options(NodeOptions, frozen=True, kw_only=True):
    """`offset` and `size` in bytes; without `size` the window reaches to the end of `file`."""

    file: NodeRef
    offset: Size = 0
    size: Size | None = None


async def open_raw(context: OpenContext, options: Options) -> Opened:
    """Open the child and lay the window over it."""
    child = await context.child("file", options.file)
    size = child.size - options.offset if options.size is None else options.size
    if options.offset > child.size or size > child.size - options.offset:
        raise BlockError(
            Kind.INVALID,
            f"The window of {size} bytes at {options.offset} is larger than the {child.size} bytes of"
            f" '{child.filename}'",
        )
    if size % SECTOR and options.size is not None:
        raise BlockError(Kind.INVALID, f"Specified size is not multiple of {SECTOR}: {size}")
    handle = kernel.raw_open(child.handle, options.offset, options.size or 0, context.flags)
    return Opened(handle, child.filename, context.read_only, FormatInfo(dirty=False))


DRIVER = Driver(names=("raw",), options=Options, open=open_raw)
