"""A graph on the real kernel for one test, and shorthand for the options of images."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nbd_backend.block import kernel
from nbd_backend.block.drivers.error_inject import Rule, add_rule
from nbd_backend.block.events import EventRing
from nbd_backend.block.graph import Graph
from nbd_backend.block.security import PathPolicy

MIB = 1 << 20


@asynccontextmanager
async def new_graph(policy: PathPolicy | None = None) -> AsyncIterator[Graph]:
    """An empty graph; whatever the test left in it is closed, and must close."""
    with EventRing() as ring:
        graph = Graph(ring, policy)
        yield graph
        await graph.close()
        assert graph.nodes() == []


def image(path: Path, name: str = "top", driver: str = "qcow2", **options: Any) -> dict[str, Any]:
    """blockdev-add's options of an image; underscores in the names of `options` stand for dashes."""
    further = {key.replace("_", "-"): value for key, value in options.items()}
    file = {"driver": "file", "filename": str(path)}
    return {"driver": driver, "node-name": name, "file": file, **further}


def null(name: str, **options: Any) -> dict[str, Any]:
    """blockdev-add's options of a null node of 1 MiB that reads as zeroes."""
    further = {key.replace("_", "-"): value for key, value in options.items()}
    return {"driver": "null-co", "node-name": name, "size": MIB, "read-zeroes": True, **further}


def failing_reads(node: kernel.Node) -> kernel.Node:
    """A filter through which every read fails with EIO: it shows who goes through it."""
    made = kernel.error_inject_open(node, kernel.NodeFlag(0))
    add_rule(made, Rule(operations=["read"], errno="EIO"))
    return made


def open_files(directory: Path) -> list[Path]:
    """Files below `directory` that this process has open."""
    found = [link.resolve() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return [path for path in found if path.is_relative_to(directory)]


def wait_for_a_request(export: kernel.Export) -> None:
    """Block until `export` has a request in flight."""
    while not export.counters().in_flight:
        time.sleep(0.001)
