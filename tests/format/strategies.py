"""Hypothesis strategies: layers below an image of given version and cluster size, and requests to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from hypothesis import strategies as st

from tests.format.chains import CLUSTER_SIZES, Compression, Fill, FillKind, Layer, Version, disk_size
from tests.format.model import Kind, Operation

Base = Literal[
    "none", "raw shorter", "raw equal", "raw longer", "qcow2 shorter", "qcow2 equal", "qcow2 longer",
    "zlib", "zstd", "chain",
]  # fmt: skip
versions: st.SearchStrategy[Version] = st.sampled_from((2, 3))
compressions: st.SearchStrategy[Compression] = st.sampled_from(("zlib", "zstd"))
BASES: tuple[Base, ...] = get_args(Base)
_LENGTHS = {"shorter": 5, "equal": 8, "longer": 11}
"""Size of a base in eighths of the image above it."""
FILL_KINDS: tuple[FillKind, ...] = get_args(FillKind)
OPERATION_KINDS: tuple[Kind, ...] = ("write", "write", "zero", "zero, keep space", "trim", "read", "flush")


@dataclass(frozen=True)
class Case:
    """A chain, lowest layer first, and what is done to its top layer."""

    layers: tuple[Layer, ...]
    operations: tuple[Operation, ...]

    @property
    def top(self) -> Layer:
        """The layer that is served."""
        return self.layers[-1]


def fills(size: int, cluster_size: int, kinds: tuple[FillKind, ...] = FILL_KINDS) -> st.SearchStrategy[Any]:
    """What a layer holds."""
    clusters = -(-size // cluster_size)
    fill = st.builds(
        Fill,
        st.sampled_from(kinds),
        st.integers(0, clusters - 1),
        st.integers(1, max(1, clusters // 3)),
        st.integers(1, 255),
    )
    return st.lists(fill, min_size=2, max_size=6).map(tuple)


@st.composite
def lower_layers(draw: st.DrawFn, base: Base, size: int) -> tuple[Layer, ...]:
    """The layers below an image of `size` bytes."""
    if base == "none":
        return ()
    if base == "chain":
        depth = draw(st.integers(2, 3))
        return tuple(draw(qcow2_layer(size, draw(st.integers(4, 12)))) for _ in range(depth))
    kind, _, length = base.partition(" ")
    eighths = _LENGTHS.get(length, 8)
    if kind == "raw":
        raw = Layer(size * eighths // 8 // 512 * 512, raw=True, cluster_size=4096)
        return (raw.with_fills(*draw(fills(raw.size, 4096, ("data", "zero", "discard")))),)
    if kind == "qcow2":
        return (draw(qcow2_layer(size, eighths)),)
    compressed = Layer(
        size, draw(st.sampled_from(CLUSTER_SIZES[1:])), 3, "zstd" if kind == "zstd" else "zlib"
    )
    return (compressed.with_fills(*draw(fills(size, compressed.cluster_size, ("compressed", "data")))),)


@st.composite
def qcow2_layer(draw: st.DrawFn, size: int, eighths: int) -> Layer:
    """A qcow2 layer of some eighths of `size`, any version, any cluster size that does not make it huge."""
    version = draw(versions)
    own_size = max(512, size * eighths // 8 // 512 * 512)
    cluster_size = draw(st.sampled_from([each for each in CLUSTER_SIZES if own_size // each <= 5000]))
    compression = draw(compressions) if version == 3 else "zlib"
    layer = Layer(own_size, cluster_size, version, compression)
    return layer.with_fills(*draw(fills(own_size, cluster_size)))


@st.composite
def operations(draw: st.DrawFn, size: int, cluster_size: int) -> Operation:
    """A request whose ends lie on, or just beside, borders of sectors and clusters, or anywhere."""
    kind = draw(st.sampled_from(OPERATION_KINDS))
    if kind == "flush":
        return Operation(kind)
    cluster = draw(st.integers(0, (size - 1) // cluster_size)) * cluster_size
    offset = cluster + draw(st.sampled_from([0, 0, 1, 511, 512, cluster_size // 2, cluster_size - 1]))
    offset = min(offset, size - 1)
    lengths = [1, 511, 512, cluster_size - 1, cluster_size, cluster_size, cluster_size + 1, 3 * cluster_size]
    count = draw(st.sampled_from(lengths) | st.integers(1, 4 * cluster_size))
    if kind in ("zero", "zero, keep space", "trim"):
        count *= draw(st.sampled_from([1, 1, 1, 16]))
    count = max(1, min(count, size - offset))
    return Operation(kind, offset, count, draw(st.integers(0, 255)), draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn, version: Version, cluster_size: int, base: Base) -> Case:
    """An image of this version and cluster size over a base of this kind, and a sequence of requests."""
    size = disk_size(cluster_size, draw(st.integers(0, 63)))
    lower = draw(lower_layers(base, size))
    top = Layer(size, cluster_size, version)
    if draw(st.booleans()):
        top = top.with_fills(*draw(fills(size, cluster_size)))
    return Case(
        (*lower, top), tuple(draw(st.lists(operations(size, cluster_size), min_size=10, max_size=30)))
    )
