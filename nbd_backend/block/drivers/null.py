"""A disk that forgets: for measuring and for tests."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec

from nbd_backend.block import kernel
from nbd_backend.block.driver import Driver, OpenContext, Opened
from nbd_backend.block.options import NodeOptions
from nbd_backend.block.units import GIB

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Options(NodeOptions, frozen=True, kw_only=True):
    """`size` in bytes, `latency_ns` per request; without `read_zeroes` a read returns whatever the buffer
    held.
    """

    size: Count = GIB
    latency_ns: Count = 0
    read_zeroes: bool = False


async def open_null(context: OpenContext, options: Options) -> Opened:
    """Nothing to open."""
    handle = kernel.null_open(options.size, options.latency_ns, options.read_zeroes, context.flags)
    shown = {"driver": options.driver, "size": options.size}
    return Opened(handle, f"json:{json.dumps(shown)}", context.read_only)


DRIVER = Driver(names=("null-co", "null-aio"), options=Options, open=open_null)
