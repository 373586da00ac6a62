"""qcow2 layers: checks the header, finds the backing layer, hands the tables to the kernel."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from nbd_backend.block import kernel
from nbd_backend.block.chain import implicit_backing
from nbd_backend.block.describe import fault_text
from nbd_backend.block.driver import Driver, Lineage, OpenContext, Opened
from nbd_backend.block.errors import BadImage, BlockError, KernelError
from nbd_backend.block.kernel import FaultKind, ImageFault, NodeFlag, Qcow2Layout
from nbd_backend.block.node import BlockNode, FormatInfo
from nbd_backend.block.options import NodeOptions, NodeRef
from nbd_backend.block.qcow2 import header as qcow2
from nbd_backend.block.qcow2.features import Compatible, Incompatible
from nbd_backend.block.qcow2.header import Header, full_backing_name
from nbd_backend.block.qcow2.support import bitmap_count, refuse_unsupported
from nbd_backend.block.units import KIB, MIB, ceil_div

DEFAULT_L2_CACHE = 32 * MIB
"""Most bytes of L2 tables that one image keeps in memory by default; a smaller image needs less."""
DEFAULT_REFCOUNT_CACHE = 1 * MIB

CacheSize = Annotated[int, msgspec.Meta(ge=64 * KIB, le=1 << 40)]


class Options(NodeOptions, frozen=True, kw_only=True):
    """`backing`: a node, or null for none; left out, the header names it. Cache sizes in bytes of tables."""

    file: NodeRef
    backing: NodeRef | msgspec.UnsetType | None = msgspec.UNSET
    l2_cache_size: CacheSize | None = None
    refcount_cache_size: CacheSize | None = None


async def open_qcow2(context: OpenContext, options: Options) -> Opened:
    """Open file, header, backing layer and tables, in this order."""
    file = await context.child("file", options.file)
    header = await context.run(read_header, file, not context.read_only)
    backing_ref = implicit_backing(header, file) if options.backing is msgspec.UNSET else options.backing
    backing = None
    if backing_ref is not None:
        lineage = Lineage(file.identity, context.lineage) if file.identity else context.lineage
        try:
            backing = await context.child("backing", backing_ref, read_only=True, lineage=lineage)
        except KernelError as error:
            raise _name_overlay(error, header, file.filename) from None
    handle = await context.run(_open_tables, file, backing, header, options, context.flags)
    try:
        if header.autoclear and not context.read_only:
            await context.run(_clear_autoclear, file)
    except BlockError:
        handle.close()
        raise
    return Opened(handle, file.filename, context.read_only, format_info(header, file.filename))


def _name_overlay(error: KernelError, header: Header, overlay: str) -> KernelError:
    """A backing file that could not be opened, told with the image that names it."""
    backing = full_backing_name(header, overlay)
    if not error.message.startswith(f"Could not open '{backing}'"):
        return error  # a layer further below, told already
    return KernelError(
        f"Could not open backing file '{backing}' of '{overlay}'",
        error.errno,
        hint=error.hint or f"look at what it records: qemu-img info {overlay}",
    )


def read_header(file: BlockNode, writable: bool) -> Header:
    """The checked header of the image in `file`; refuses what cannot be served. Blocks."""
    size = file.size
    data = file.handle.pread(min(size, 4 * KIB), 0) if size else b""
    first_cluster = qcow2.first_cluster_bytes(data)
    if first_cluster > len(data):
        data = file.handle.pread(min(size, first_cluster), 0)
    header = qcow2.parse(data, file.filename, size)
    refuse_unsupported(header, file.filename, writable=writable)
    if writable:
        bitmap_count(header, file.filename, size)
    return header


def _open_tables(
    file: BlockNode, backing: BlockNode | None, header: Header, options: Options, flags: NodeFlag
) -> kernel.Node:
    layout = layout_of(header, options.l2_cache_size, options.refcount_cache_size)
    try:
        return kernel.qcow2_open(file.handle, backing.handle if backing else None, layout, flags)
    except ImageFault as fault:
        raise describe_fault(fault, file.filename) from None


def layout_of(header: Header, l2_cache: int | None, refcount_cache: int | None) -> Qcow2Layout:
    """What the kernel needs of a header; caches are no larger than all that the image can have."""
    all_l2 = ceil_div(header.size, header.cluster_size) * 8
    return Qcow2Layout(
        version=header.version,
        cluster_bits=header.cluster_bits,
        refcount_order=header.refcount_order,
        compression_type=header.compression_type,
        l1_entries=header.l1_entries,
        reftable_clusters=header.reftable_clusters,
        size=header.size,
        l1_offset=header.l1_offset,
        reftable_offset=header.reftable_offset,
        l2_cache_bytes=min(l2_cache or DEFAULT_L2_CACHE, max(all_l2, 64 * KIB)),
        refcount_cache_bytes=max(refcount_cache or DEFAULT_REFCOUNT_CACHE, 4 * header.cluster_size),
        names_backing=header.backing_file is not None,
    )


def describe_fault(fault: ImageFault, file: str) -> BadImage:
    """The kernel's finding with the file's name."""
    by_index = fault.fault in (FaultKind.L1_ENTRY, FaultKind.REFTABLE_ENTRY)
    at = fault.index if by_index else fault.offset
    problem = fault_text(fault.fault, at, fault.value)
    return BadImage(
        file, fault.fault.name, hex(fault.value), problem, hint=f"look closer: qemu-img check {file}"
    )


def _clear_autoclear(file: BlockNode) -> None:
    """Say that bitmaps and whatever else we do not maintain are out of date, before the first guest write."""
    file.handle.pwrite(bytes(8), qcow2.AUTOCLEAR_OFFSET, kernel.RequestFlag.FUA)


def format_info(header: Header, file: str) -> FormatInfo:
    """What queries tell of the image."""
    specific: dict[str, Any] = {"compat": "0.10", "refcount-bits": header.refcount_bits}
    if header.version == 3:
        specific |= {
            "compat": "1.1",
            "lazy-refcounts": bool(header.compatible & Compatible.LAZY_REFCOUNTS),
            "corrupt": bool(header.incompatible & Incompatible.CORRUPT),
            "extended-l2": bool(header.incompatible & Incompatible.EXTENDED_L2),
        }
    specific["compression-type"] = header.compression
    return FormatInfo(
        cluster_size=header.cluster_size,
        backing_filename=header.backing_file,
        full_backing_filename=qcow2.full_backing_name(header, file),
        backing_format=header.backing_format,
        dirty=bool(header.incompatible & Incompatible.DIRTY),
        specific={"type": "qcow2", "data": specific},
    )


DRIVER = Driver(names=("qcow2",), options=Options, open=open_qcow2)
