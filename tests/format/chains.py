"""Chains of images made by qemu-img and qemu-io from a description, for tests that compare what they hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests.support import images

SECTOR = 512
CLUSTER_SIZES = (512, 4096, 65536, 2 << 20)
SIZES = {512: 100 << 10, 4096: 5 << 19, 65536: 1 << 20, 2 << 20: 9 << 20}
"""Bytes of a disk by cluster size: more than one L2 table where that is possible."""

Version = Literal[2, 3]
Compression = Literal["zlib", "zstd"]
FillKind = Literal["data", "zero", "unmapped zero", "preallocated zero", "compressed", "discard"]


@dataclass(frozen=True)
class Fill:
    """What happens to some clusters of a layer when it is made; cluster numbers count from its start."""

    kind: FillKind
    first: int
    count: int
    pattern: int


@dataclass(frozen=True)
class Layer:
    """One image of a chain. `size` in bytes; a raw layer is the lowest one."""

    size: int
    cluster_size: int = 65536
    version: Version = 3
    compression: Compression = "zlib"
    raw: bool = False
    fills: tuple[Fill, ...] = ()

    def options(self) -> dict[str, object]:
        """Its options for qemu-img create."""
        options: dict[str, object] = {
            "cluster_size": self.cluster_size,
            "compat": "0.10" if self.version == 2 else "1.1",
        }
        if self.version == 3:
            options["compression_type"] = self.compression
        return options

    def with_fills(self, *fills: Fill) -> Layer:
        """The same layer with more in it."""
        return replace(self, fills=(*self.fills, *fills))


def disk_size(cluster_size: int, sectors: int) -> int:
    """The usual size of a disk of this cluster size, with a tail of some sectors in its last cluster."""
    return SIZES[cluster_size] + (sectors * SECTOR) % max(cluster_size, 8 * SECTOR)


def make_chain(directory: Path, layers: tuple[Layer, ...]) -> Path:
    """Make the layers, lowest first, in a directory of their own; the path of the top one."""
    directory.mkdir()
    top: Path | None = None
    below: Layer | None = None
    for number, layer in enumerate(layers):
        path = directory / f"{number}.{'raw' if layer.raw else 'qcow2'}"
        top = make_layer(path, layer, top, below)
        below = layer
    assert top is not None
    return top


def make_layer(path: Path, layer: Layer, backing: Path | None, below: Layer | None) -> Path:
    """Make one layer over `backing`, whose description is `below`."""
    if layer.raw:
        with path.open("wb") as empty:
            empty.truncate(layer.size)
    else:
        backing_fmt = "raw" if below and below.raw else "qcow2"
        images.create(path, layer.size, backing=backing, backing_fmt=backing_fmt, options=layer.options())
    commands = compressed_commands(layer) + plain_commands(layer)
    if commands:
        images.qemu_io(path, *commands, fmt="raw" if layer.raw else "qcow2")
    return path


def plain_commands(layer: Layer) -> list[str]:
    """The qemu-io commands of all fills but the compressed ones, cut at the layer's end."""
    commands = []
    for fill in layer.fills:
        offset = fill.first * layer.cluster_size
        count = min(fill.count * layer.cluster_size, layer.size - offset)
        where = f"{offset} {count}"
        data = f"write -P {fill.pattern} {where}"
        commands += {
            "data": [data],
            "zero": [f"write -z {where}"],
            "unmapped zero": [f"write -z -u {where}"],
            "preallocated zero": [data, f"write -z {where}"],
            "discard": [f"discard {where}"],
            "compressed": [],
        }[fill.kind]
    return commands


def compressed_commands(layer: Layer) -> list[str]:
    """Compressed writes of whole clusters, each once, because they cannot overwrite anything."""
    patterns = {
        cluster: fill.pattern
        for fill in layer.fills
        if fill.kind == "compressed"
        for cluster in range(fill.first, fill.first + fill.count)
        if (cluster + 1) * layer.cluster_size <= layer.size
    }
    return [
        f"write -c -P {pattern} {cluster * layer.cluster_size} {layer.cluster_size}"
        for cluster, pattern in sorted(patterns.items())
    ]
