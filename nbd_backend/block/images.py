"""Looking at images at rest: for commands, not for the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from nbd_backend.block.chain import image_options
from nbd_backend.block.events import EventRing
from nbd_backend.block.graph import Graph
from nbd_backend.block.node import BlockNode
from nbd_backend.block.security import PathPolicy

T = TypeVar("T")


def with_chain(
    path: str, image_format: str, use: Callable[[BlockNode], T], policy: PathPolicy | None = None
) -> T:
    """Open the image at `path` and its chain read-only, whoever else has it open; return `use(top)`.

    Runs an event loop of its own, so it must not be called from one. `use` may block.
    """

    async def look() -> T:
        with EventRing() as ring:
            graph = Graph(ring, policy)
            options = image_options(path, image_format, **{"read-only": True, "force-share": True})
            try:
                return use(await graph.add_unnamed(options))
            finally:
                await graph.close()

    return asyncio.run(look())
