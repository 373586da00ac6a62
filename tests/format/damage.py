"""Ways to damage a qcow2 image byte by byte, from the format's specification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support import images

MIB = 1 << 20
CLUSTER = 65536

# Offsets of header fields.
MAGIC, VERSION, BACKING_OFFSET, BACKING_SIZE, CLUSTER_BITS, SIZE, CRYPT = 0, 4, 8, 16, 20, 24, 32
L1_SIZE, L1_OFFSET, REFTABLE_OFFSET, REFTABLE_CLUSTERS, SNAPSHOTS, SNAPSHOTS_OFFSET = 36, 40, 48, 56, 60, 64
INCOMPATIBLE, REFCOUNT_ORDER, HEADER_LENGTH, COMPRESSION = 72, 96, 100, 104

COPIED, COMPRESSED = 1 << 63, 1 << 62
CORRUPT_BIT = 2


@dataclass(frozen=True)
class Image:
    """A qcow2 image of 4 MiB with 64 KiB clusters: data in the first half, compressed in cluster 40."""

    path: Path

    def get(self, offset: int, width: int = 8) -> int:
        """The big-endian number at `offset` of the file."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return int.from_bytes(file.read(width), "big")

    def put(self, offset: int, value: int, width: int = 8) -> Image:
        """Overwrite it; returns the image, so that damages can be chained."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(value.to_bytes(width, "big"))
        return self

    @property
    def l1(self) -> int:
        """File offset of the L1 table."""
        return self.get(L1_OFFSET)

    def l2_entry(self, cluster: int) -> int:
        """File offset of the L2 entry of a guest cluster of the first L2 table."""
        return (self.get(self.l1) & 0x00FFFFFFFFFFFE00) + 8 * cluster

    @property
    def file_size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    def truncate(self, size: int) -> None:
        """Cut the file."""
        with self.path.open("r+b") as file:
            file.truncate(size)


def healthy(path: Path, *, compat: str = "1.1") -> Image:
    """An undamaged image."""
    images.create(path, 4 * MIB, options={"cluster_size": CLUSTER, "compat": compat})
    images.qemu_io(path, "write -P 0x11 0 2M", f"write -c -P 0x22 {40 * CLUSTER} {CLUSTER}")
    return Image(path)
