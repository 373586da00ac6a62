"""Look at disk images: what they are, and where their data is.

`info` tells what the headers say; `map` where each part of the disk comes from, through the whole backing
chain. With --json both print what qemu-img prints with --output=json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from nbd_backend.block.describe import describe_image
from nbd_backend.block.kernel import Extent, ExtentFlag
from nbd_backend.block.node import BlockNode

from . import _format
from ._local import add_image, inspect

EXTENTS_AT_ONCE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define ``image info`` and ``image map``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser("info", help="what the header says", description="Tell what an image is.")
    add_image(info, help="the image")
    info.add_argument("--backing-chain", action="store_true", help="the layers below it, too")
    info.set_defaults(show=show_info)
    mapping = actions.add_parser(
        "map", help="where the data is", description="Tell where each part comes from."
    )
    add_image(mapping, help="the image")
    mapping.set_defaults(show=show_map)
    for action in (info, mapping):
        action.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for."""
    arguments.show(arguments)
    return 0


# ---- info ----


def show_info(arguments: argparse.Namespace) -> None:
    """``image info``."""

    async def describe(node: BlockNode) -> list[dict[str, Any]]:
        return [describe_image(layer) for layer in (node.chain() if arguments.backing_chain else [node])]

    layers = inspect(arguments.image, arguments.format, describe)
    if arguments.json:
        print(json.dumps(layers if arguments.backing_chain else layers[0], indent=4))
    else:
        print("\n\n".join("\n".join(info_lines(layer)) for layer in layers))


def info_lines(image: dict[str, Any]) -> Iterator[str]:
    """An image's description for people."""
    yield f"image: {image['filename']}"
    yield f"file format: {image['format']}"
    yield f"virtual size: {_format.size(image['virtual-size'])} ({image['virtual-size']} bytes)"
    if "actual-size" in image:
        yield f"disk size: {_format.size(image['actual-size'])}"
    if "cluster-size" in image:
        yield f"cluster_size: {image['cluster-size']}"
    if "backing-filename" in image:
        full = image["full-backing-filename"]
        shown = "" if full == image["backing-filename"] else f" (actual path: {full})"
        yield f"backing file: {image['backing-filename']}{shown}"
    if "backing-filename-format" in image:
        yield f"backing file format: {image['backing-filename-format']}"
    if "format-specific" in image:
        yield "Format specific information:"
        for key, value in image["format-specific"]["data"].items():
            shown = str(value).lower() if isinstance(value, bool) else value
            yield f"    {key.replace('-', ' ')}: {shown}"


# ---- map ----


class Run(NamedTuple):
    """Neighbouring bytes of the disk of which the same can be said; `offset`: where in `file`, or None."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    file: str

    def continues(self, other: Run) -> bool:
        """Whether `other`, which starts where this ends, only makes it longer."""
        follows = self.offset is None or other.offset == self.offset + self.length
        return follows and self.kind == other.kind

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal in neighbours that are shown as one."""
        return (
            self.depth,
            self.present,
            self.zero,
            self.data,
            self.compressed,
            self.offset is None,
            self.file,
        )


def show_map(arguments: argparse.Namespace) -> None:
    """``image map``."""
    runs = inspect(arguments.image, arguments.format, map_image)
    if arguments.json:
        print(json_lines(runs))
        return
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for run in runs:
        if run.data:
            place = "compressed" if run.offset is None else f"{run.offset:#x}"
            print(f"{run.start:<#16x}{run.length:<#16x}{place:<16}{run.file}")


async def map_image(node: BlockNode) -> list[Run]:
    """Every part of the disk, in order."""
    layers = node.chain()
    runs: list[Run] = []
    position = 0
    while position < node.size:
        extents = await asyncio.to_thread(
            node.handle.block_status, position, node.size - position, None, EXTENTS_AT_ONCE
        )
        for extent in extents:
            _append(runs, _run_of(extent, layers))
        position = extents[-1].offset + extents[-1].length
    return runs or [Run(0, 0, 0, False, False, False, False, None, node.filename)]


def _run_of(extent: Extent, layers: list[BlockNode]) -> Run:
    # Where no layer answers, the last one that reaches so far is the one that lacks it.
    nowhere = extent.node_id == 0
    depth = extent.depth - 1 if nowhere else extent.depth
    return Run(
        start=extent.offset,
        length=extent.length,
        depth=depth,
        present=not nowhere,
        zero=bool(extent.flags & ExtentFlag.ZERO),
        data=bool(extent.flags & ExtentFlag.DATA),
        compressed=bool(extent.flags & ExtentFlag.COMPRESSED),
        offset=extent.host_offset if extent.flags & ExtentFlag.OFFSET else None,
        file=layers[depth].filename,
    )


def _append(runs: list[Run], run: Run) -> None:
    if runs and runs[-1].continues(run):
        runs[-1] = runs[-1]._replace(length=runs[-1].length + run.length)
    else:
        runs.append(run)


def json_lines(runs: list[Run]) -> str:
    """A JSON list with a line for each run, as qemu-img writes it."""
    members = []
    for run in runs:
        member: dict[str, object] = {name: getattr(run, name) for name in _JSON_MEMBERS}
        if run.offset is not None:
            member["offset"] = run.offset
        members.append(json.dumps(member))
    return "[" + ",\n".join(members) + "]"


_JSON_MEMBERS = ("start", "length", "depth", "present", "zero", "data", "compressed")
