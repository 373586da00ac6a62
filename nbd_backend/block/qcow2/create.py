"""New images: qcow2 version 3 as qemu-img makes them by default, and raw.

Layout of a new qcow2 image, in clusters: header | refcount table | refcount blocks | L1 table. Nothing of the
disk is allocated. The file is written and synced in one go; the header goes last, so that a crash leaves no
valid image.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbd_backend.block.errors import BlockError, KernelError, Kind
from nbd_backend.block.qcow2 import header as qcow2
from nbd_backend.block.qcow2.features import Autoclear, Compatible, Extension, FeatureKind, Incompatible
from nbd_backend.block.units import KIB, SECTOR, ceil_div, is_power_of_two

DEFAULT_CLUSTER_SIZE = 64 * KIB
_REFCOUNT_ORDER = 4  # 16 bits
_ENTRY = 8
_MAX_L1_BYTES = 32 << 20
_MIN_CLUSTER, _MAX_CLUSTER = 1 << qcow2.MIN_CLUSTER_BITS, 1 << qcow2.MAX_CLUSTER_BITS

_FEATURES = (
    (FeatureKind.INCOMPATIBLE, Incompatible.DIRTY, "dirty bit"),
    (FeatureKind.INCOMPATIBLE, Incompatible.CORRUPT, "corrupt bit"),
    (FeatureKind.INCOMPATIBLE, Incompatible.DATA_FILE, "external data file"),
    (FeatureKind.INCOMPATIBLE, Incompatible.COMPRESSION_TYPE, "compression type"),
    (FeatureKind.INCOMPATIBLE, Incompatible.EXTENDED_L2, "extended L2 entries"),
    (FeatureKind.COMPATIBLE, Compatible.LAZY_REFCOUNTS, "lazy refcounts"),
    (FeatureKind.AUTOCLEAR, Autoclear.BITMAPS, "bitmaps"),
    (FeatureKind.AUTOCLEAR, Autoclear.RAW_DATA_FILE, "raw external data"),
)


@dataclass(frozen=True, slots=True)
class Backing:
    """The layer below a new image: the name as it is to be recorded, and its format."""

    file: str
    format: str


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tables of a new image lie, in clusters."""

    cluster_size: int
    l1_entries: int
    l1_clusters: int
    refblocks: int
    reftable_clusters: int

    @property
    def l1_offset(self) -> int:
        return (1 + self.reftable_clusters + self.refblocks) * self.cluster_size

    @property
    def refblock_offset(self) -> int:
        return (1 + self.reftable_clusters) * self.cluster_size

    @property
    def clusters(self) -> int:
        return 1 + self.reftable_clusters + self.refblocks + self.l1_clusters


def create_qcow2(
    path: str, size: int, *, backing: Backing | None = None, cluster_size: int = DEFAULT_CLUSTER_SIZE
) -> None:
    """Write a new image of `size` bytes (rounded up to 512) to `path`, replacing the content of a file that
    is there.

    Raises BlockError for sizes and names that the format cannot hold, KernelError for failures of the file
    system; a file that was not there before is removed again then. Blocks.
    """
    size = ceil_div(size, SECTOR) * SECTOR
    layout = _layout(path, size, cluster_size)
    first_cluster = _header(path, size, layout, backing)
    _write(path, layout, first_cluster)


def create_raw(path: str, size: int) -> None:
    """Make `path` a file of `size` bytes (rounded up to 512) that reads as zeroes. Blocks."""
    with _new_file(path) as descriptor:
        os.ftruncate(descriptor, ceil_div(size, SECTOR) * SECTOR)
        os.fsync(descriptor)


def _layout(path: str, size: int, cluster_size: int) -> _Layout:
    if not is_power_of_two(cluster_size) or not _MIN_CLUSTER <= cluster_size <= _MAX_CLUSTER:
        raise BlockError(
            Kind.INVALID,
            f"Could not create '{path}': Cluster size must be a power of two between"
            f" 512 and 2048k, not {cluster_size}",
        )
    l1_entries = ceil_div(size, cluster_size * (cluster_size // _ENTRY))
    if l1_entries * _ENTRY > _MAX_L1_BYTES or size >= 1 << 63:
        raise BlockError(
            Kind.INVALID,
            f"Could not create '{path}': {size} bytes are too many for clusters of {cluster_size} bytes",
            hint="choose larger clusters",
        )
    l1_clusters = ceil_div(l1_entries * _ENTRY, cluster_size)
    return _fit_refcounts(cluster_size, l1_entries, l1_clusters)


def _fit_refcounts(cluster_size: int, l1_entries: int, l1_clusters: int) -> _Layout:
    """Refcount tables that cover the other clusters and themselves, found in a few rounds."""
    refblocks = reftable = 1
    while True:
        layout = _Layout(cluster_size, l1_entries, l1_clusters, refblocks, reftable)
        need_blocks = ceil_div(layout.clusters, cluster_size * 8 >> _REFCOUNT_ORDER)
        need_table = ceil_div(need_blocks * _ENTRY, cluster_size)
        if (need_blocks, need_table) == (refblocks, reftable):
            return layout
        refblocks, reftable = max(need_blocks, refblocks), max(need_table, reftable)


def _header(path: str, size: int, layout: _Layout, backing: Backing | None) -> bytes:
    """Header, extensions and backing name: what the first cluster begins with."""
    name = os.fsencode(backing.file) if backing else b""
    extensions = _extension(Extension.BACKING_FORMAT, backing.format.encode()) if backing else b""
    features = _feature_names()
    end = _extension(Extension.END, b"")
    room = layout.cluster_size - qcow2.V3_LENGTH - len(extensions) - len(end) - len(name)
    if len(features) <= room:  # the table is a convenience: small clusters do without
        extensions += features
        room -= len(features)
    if room < 0 or len(name) > 1023:
        raise BlockError(Kind.INVALID, f"Could not create '{path}': Backing file name too long: '{name!r}'")
    extensions += end
    name_offset = qcow2.V3_LENGTH + len(extensions) if name else 0
    fixed = struct.pack(
        ">IIQIIQIIQQIIQQQQII8x",
        qcow2.MAGIC, 3, name_offset, len(name), layout.cluster_size.bit_length() - 1, size, 0,
        layout.l1_entries, layout.l1_offset, layout.cluster_size, layout.reftable_clusters, 0, 0,
        0, 0, 0, _REFCOUNT_ORDER, qcow2.V3_LENGTH,
    )  # fmt: skip
    return fixed + extensions + name


def _extension(kind: Extension, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def _feature_names() -> bytes:
    table = b"".join(
        struct.pack(">BB46s", kind, bit.bit_length() - 1, name.encode()) for kind, bit, name in _FEATURES
    )
    return _extension(Extension.FEATURE_NAMES, table)


def _write(path: str, layout: _Layout, first_cluster: bytes) -> None:
    reftable = b"".join(
        (layout.refblock_offset + i * layout.cluster_size).to_bytes(_ENTRY, "big")
        for i in range(layout.refblocks)
    )
    refcounts = (1).to_bytes(2, "big") * layout.clusters
    with _new_file(path) as descriptor:
        os.ftruncate(descriptor, layout.clusters * layout.cluster_size)
        _write_all(descriptor, reftable, layout.cluster_size)
        _write_all(descriptor, refcounts, layout.refblock_offset)
        os.fsync(descriptor)
        _write_all(descriptor, first_cluster, 0)
        os.fsync(descriptor)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def _new_file(path: str) -> Iterator[int]:
    """The descriptor of an empty file at `path`; on failure a file that was not there before is removed."""
    existed = Path(path).exists()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            yield descriptor
        except BaseException:
            if not existed:
                Path(path).unlink()
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError(f"Could not create '{path}'", error.errno or errno.EIO) from None
