"""Opening images in the command's own process, to look at them."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from nbd_backend.block.chain import image_options
from nbd_backend.block.errors import BlockError
from nbd_backend.block.events import EventRing
from nbd_backend.block.graph import Graph
from nbd_backend.block.node import BlockNode

from . import CliError

T = TypeVar("T")


def add_image(parser: argparse.ArgumentParser, **options: str) -> None:
    """Define the IMAGE argument and its --format."""
    # What argparse takes by name is of many types; a dict of them has none.
    parser.add_argument("image", metavar="IMAGE", **options)  # type: ignore[arg-type]
    parser.add_argument(
        "--format", choices=["qcow2", "raw"], default="qcow2", help="of the image; default: %(default)s"
    )


def inspect(path: str, image_format: str, look: Callable[[BlockNode], Awaitable[T]]) -> T:
    """Open the image with all layers below it read-only, and return what `look` makes of its node."""

    async def open_and_look() -> T:
        async with _opened(path, image_format) as node:
            return await look(node)

    try:
        return asyncio.run(open_and_look())
    except BlockError as error:
        raise CliError(f"{error} ({error.hint})" if error.hint else str(error)) from error


@asynccontextmanager
async def _opened(path: str, image_format: str) -> AsyncIterator[BlockNode]:
    with EventRing() as ring:
        graph = Graph(ring)
        options = image_options(path, image_format, **{"read-only": True, "force-share": True})
        try:
            yield await graph.add_unnamed(options)
        finally:
            await graph.close()
