"""Dirty bitmaps beside the kernel's: what makes a granularity valid, and bitmaps of a disk. Any thread."""

from __future__ import annotations

from nbd_backend.block import kernel
from nbd_backend.block.errors import BlockError, Kind
from nbd_backend.block.node import BlockNode
from nbd_backend.block.units import GIB, KIB, SECTOR, is_power_of_two

MAX_GRANULARITY = 2 * GIB


def default_granularity(node: BlockNode) -> int:
    """The cluster size of `node` within 4 KiB to 64 KiB; 64 KiB for a node without clusters."""
    return min(max(node.info.cluster_size or 64 * KIB, 4 * KIB), 64 * KIB)


def new_bitmap(size: int, granularity: int) -> kernel.Bitmap:
    """A clean bitmap of a disk of `size` bytes; raises BlockError when `granularity` (bytes per bit) is not
    allowed.
    """
    if not is_power_of_two(granularity) or granularity < SECTOR:
        raise BlockError(
            Kind.INVALID, "Granularity must be power of 2 and at least 512", hint=f"{granularity} was given"
        )
    if granularity > MAX_GRANULARITY:
        raise BlockError(Kind.INVALID, f"Granularity {granularity} is larger than {MAX_GRANULARITY} bytes")
    return kernel.Bitmap.new(size, granularity)
