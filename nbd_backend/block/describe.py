"""What queries tell about nodes: QMP's BlockDeviceInfo and ImageInfo. Loop."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from nbd_backend.block.errors import KernelError
from nbd_backend.block.kernel import FaultKind
from nbd_backend.block.node import BlockNode

_UNLIMITED = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


def describe_node(node: BlockNode, *, flat: bool = False) -> dict[str, Any]:
    """BlockDeviceInfo of `node`; with `flat` its image is told without the images below it."""
    backing = node.backing
    info: dict[str, Any] = {
        "node-name": node.name,
        "drv": node.driver,
        "ro": node.read_only,
        "file": node.filename,
        "backing_file_depth": 0 if flat else node.depth,
        "encrypted": False,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "cache": {"writeback": True, "direct": node.cache_direct, "no-flush": node.cache_no_flush},
        "image": describe_image(node) if flat else describe_images(node),
        **_UNLIMITED,
    }
    if backing is not None:
        info["backing_file"] = backing.filename
    return info


def describe_images(node: BlockNode) -> dict[str, Any]:
    """ImageInfo of `node` with those of the layers below it as ``backing-image`` inside one another."""
    layers = [describe_image(layer) for layer in ([node] if node.is_filter else node.chain())]
    for upper, lower in pairwise(layers):
        upper["backing-image"] = lower
    return layers[0]


def describe_image(node: BlockNode) -> dict[str, Any]:
    """ImageInfo of one node; what does not apply is left out."""
    info = node.info
    told = {
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": node.size,
        "actual-size": _allocated(node),
        "cluster-size": info.cluster_size,
        "backing-filename": info.backing_filename,
        "full-backing-filename": info.full_backing_filename,
        "backing-filename-format": info.backing_format,
        "dirty-flag": info.dirty,
        "format-specific": info.specific,
    }
    return {key: value for key, value in told.items() if value is not None}


def _allocated(node: BlockNode) -> int | None:
    """Bytes on the file system; None where the question has no answer, as for an NBD server."""
    try:
        return node.handle.allocated()
    except KernelError:
        return None


_FAULTS = {
    FaultKind.L1_ENTRY: "L1 table entry {at} is damaged: {value:#x}",
    FaultKind.L2_ENTRY: "L2 table entry at offset {at:#x} is damaged: {value:#x}",
    FaultKind.REFTABLE_ENTRY: "Refcount table entry {at} is damaged: {value:#x}",
    FaultKind.COMPRESSED: "Compressed cluster at offset {at:#x} is damaged: L2 entry {value:#x}",
    FaultKind.REFCOUNT: "Cluster at offset {at:#x} has refcount 0 or overlaps metadata: {value:#x}",
    FaultKind.TRUNCATED: "Table at offset {at:#x} lies beyond the end of the file ({value} bytes)",
}


def fault_text(kind: FaultKind, at: int, value: int) -> str:
    """What the kernel found damaged; `at` is an entry's number or an offset in the image, by kind."""
    return _FAULTS.get(kind, "Image metadata is damaged").format(at=at, value=value)
