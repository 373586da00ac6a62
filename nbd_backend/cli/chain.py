"""Show the backing chain of an image, or the graph of a running server, as a tree or for Graphviz.

nbd-backend chain disk.qcow2
nbd-backend chain --qmp unix:/run/nbd-backend/qmp.sock --dot | dot -Tsvg > graph.svg
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nbd_backend.block.describe import describe_image
from nbd_backend.block.node import BlockNode

from . import CliError, _format
from ._local import inspect


@dataclass
class Item:
    """Something in the picture: an export or a node, and what is below it."""

    name: str
    text: str
    below: list[Item] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define what to show and how."""
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="the top layer of a chain")
    parser.add_argument(
        "--format", choices=["qcow2", "raw"], default="qcow2", help="of IMAGE; default: %(default)s"
    )
    parser.add_argument(
        "--qmp",
        nargs="?",
        const=os.environ.get("NBD_BACKEND_QMP", ""),
        metavar="unix:PATH",
        help="ask a running server instead",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--dot", action="store_true", help="a graph for Graphviz")
    shape.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the picture."""
    if (arguments.image is None) == (arguments.qmp is None):
        raise CliError("give either an IMAGE or --qmp", 2)
    items, facts = _of_image(arguments) if arguments.image is not None else _of_server(arguments)
    if arguments.json:
        print(json.dumps(facts))
    elif arguments.dot:
        print(dot(items))
    else:
        print("\n".join(line for item in items for line in tree(item)))
    return 0


def tree(item: Item, lead: str = "", last: str = "") -> Iterator[str]:
    """The lines of a tree: `lead` stands before all of them, `last` before the item's own."""
    yield f"{lead}{last}{item.name}  {item.text}".rstrip()
    inner = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[last]
    for position, below in enumerate(item.below, 1):
        yield from tree(below, inner, "└─ " if position == len(item.below) else "├─ ")


def dot(items: list[Item]) -> str:
    """The same for Graphviz."""
    lines = ["digraph chain {", "  node [shape=box];"]
    seen: set[str] = set()
    pending = list(items)
    while pending:
        item = pending.pop(0)
        if item.name not in seen:
            seen.add(item.name)
            label = json.dumps(f"{item.name}\n{item.text}", ensure_ascii=False)
            lines.append(f"  {json.dumps(item.name)} [label={label}];")
            lines += [f"  {json.dumps(item.name)} -> {json.dumps(below.name)};" for below in item.below]
            pending += item.below
    return "\n".join([*lines, "}"])


# ---- an image ----


def _of_image(arguments: argparse.Namespace) -> tuple[list[Item], object]:
    async def describe(node: BlockNode) -> list[dict[str, Any]]:
        return [describe_image(layer) for layer in node.chain()]

    layers = inspect(arguments.image, arguments.format, describe)
    below: list[Item] = []
    for layer in reversed(layers):
        below = [Item(layer["filename"], _image_text(layer), below)]
    return below, layers


def _image_text(image: dict[str, Any]) -> str:
    used = f", {_format.size(image['actual-size'])} on disk" if "actual-size" in image else ""
    return f"{image['format']}, {_format.size(image['virtual-size'])}{used}"


# ---- a server ----


def _of_server(arguments: argparse.Namespace) -> tuple[list[Item], object]:
    from ._qmp import Session, talk

    async def ask(session: Session) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        nodes = await session.execute("query-named-block-nodes", {"flat": True})
        return nodes, await session.execute("query-block-exports")

    nodes, exports = talk(arguments, ask)
    return live_items(nodes, exports), {"nodes": nodes, "exports": exports}


def live_items(nodes: list[dict[str, Any]], exports: list[dict[str, Any]]) -> list[Item]:
    """The exports with what is below them, then the nodes that nothing is above; files are told with their
    format.
    """
    formats = {node["file"] for node in nodes if node["drv"] not in _FILES}
    layers = {
        node["node-name"]: node for node in nodes if node["drv"] not in _FILES or node["file"] not in formats
    }
    items = {name: Item(name, _node_text(node)) for name, node in layers.items()}
    covered = {export["node-name"] for export in exports}
    for name, node in layers.items():
        backing = _layer_of(node.get("backing_file"), layers)
        if backing is not None:
            items[name].below.append(items[backing])
            covered.add(backing)
    tops = [Item(f"export {export['id']}", "", [items[export["node-name"]]]) for export in exports]
    return tops + [item for name, item in items.items() if name not in covered]


_FILES = {"file", "host_device"}


def _layer_of(file: str | None, layers: dict[str, dict[str, Any]]) -> str | None:
    """The name of the layer in a file: queries tell backing layers by their files."""
    return next((name for name, layer in layers.items() if file is not None and layer["file"] == file), None)


def _node_text(node: dict[str, Any]) -> str:
    access = "read-only" if node["ro"] else "read-write"
    return f"{node['drv']}, {_format.size(node['image']['virtual-size'])}, {access}, {node['file']}"
