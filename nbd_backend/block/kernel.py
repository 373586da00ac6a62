"""The typed face of the native kernel; the only importer of ``nbd_backend._kernel``.

Handles own one reference each and drop it when closed or, at the latest, when collected. A call that fails
raises KernelError with the errno; nothing here decides anything. ``cffi_build/kernel.h`` holds each
function's contract: its units, its thread ("loop": the thread of the event loop; "any thread") and whether it
blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Self

import nbd_backend._kernel as _kernel
from nbd_backend.block.errors import KernelError

_ffi: Any = _kernel.ffi
_lib: Any = _kernel.lib


class NodeFlag(IntFlag):
    """How a node is opened."""

    READ_ONLY = _lib.NB_NODE_READ_ONLY
    DIRECT = _lib.NB_NODE_DIRECT
    UNMAP = _lib.NB_NODE_UNMAP
    NO_FLUSH = _lib.NB_NODE_NO_FLUSH


class RequestFlag(IntFlag):
    """How a write-like request is done."""

    FUA = _lib.NB_REQ_FUA
    MAY_UNMAP = _lib.NB_REQ_MAY_UNMAP
    FAST = _lib.NB_REQ_FAST


class ExtentFlag(IntFlag):
    """What an extent reads as, and where it comes from."""

    DATA = _lib.NB_EXTENT_DATA
    ZERO = _lib.NB_EXTENT_ZERO
    HOLE = _lib.NB_EXTENT_HOLE
    OFFSET = _lib.NB_EXTENT_OFFSET
    COMPRESSED = _lib.NB_EXTENT_COMPRESSED


class EventKind(IntEnum):
    """Why the kernel speaks up."""

    TASK = _lib.NB_EVENT_TASK
    SLICE = _lib.NB_EVENT_SLICE
    DRAINED = _lib.NB_EVENT_DRAINED
    CORRUPT = _lib.NB_EVENT_CORRUPT
    CBW_BROKEN = _lib.NB_EVENT_CBW_BROKEN
    CBW_FULL = _lib.NB_EVENT_CBW_FULL
    CBW_STORED = _lib.NB_EVENT_CBW_STORED


class Side(IntEnum):
    """Which end of a copy failed (``Event.c`` of EventKind.SLICE)."""

    SOURCE = _lib.NB_SIDE_SOURCE
    TARGET = _lib.NB_SIDE_TARGET
    STORE = _lib.NB_SIDE_STORE


class FaultKind(IntEnum):
    """What is wrong with an image's metadata."""

    NONE = _lib.NB_FAULT_NONE
    L1_ENTRY = _lib.NB_FAULT_L1_ENTRY
    L2_ENTRY = _lib.NB_FAULT_L2_ENTRY
    REFTABLE_ENTRY = _lib.NB_FAULT_REFTABLE_ENTRY
    COMPRESSED = _lib.NB_FAULT_COMPRESSED
    REFCOUNT = _lib.NB_FAULT_REFCOUNT
    TRUNCATED = _lib.NB_FAULT_TRUNCATED


class Event(NamedTuple):
    """One event of the ring; `error` is 0 or a positive errno. See kernel.h for `a`, `b` and `c` of each
    kind.
    """

    kind: EventKind
    error: int
    token: int
    a: int
    b: int
    c: int


class Extent(NamedTuple):
    """Guest bytes that read alike. `host_offset` counts bytes in the file of the layer that answers."""

    offset: int
    length: int
    flags: ExtentFlag
    depth: int
    host_offset: int
    node_id: int


class Counters(NamedTuple):
    """What an export has done since it was made: operations and bytes that succeeded."""

    read_ops: int
    read_bytes: int
    write_ops: int
    write_bytes: int
    zero_ops: int
    zero_bytes: int
    trim_ops: int
    trim_bytes: int
    flush_ops: int
    failed_ops: int
    in_flight: int


class CbwUsage(NamedTuple):
    """The local store of a copy-before-write node: bytes held, and guest writes that waited for it."""

    memory: int
    scratch: int
    waits: int
    wait_ns: int


@dataclass(frozen=True, slots=True)
class Qcow2Layout:
    """A checked qcow2 header as the kernel wants it; sizes and offsets in bytes."""

    version: int
    cluster_bits: int
    refcount_order: int
    compression_type: int
    l1_entries: int
    reftable_clusters: int
    size: int
    l1_offset: int
    reftable_offset: int
    l2_cache_bytes: int
    refcount_cache_bytes: int
    names_backing: bool


@dataclass(frozen=True, slots=True)
class CbwOptions:
    """See ``struct nb_cbw_options``: sizes in bytes, `on_full` 0 wait or 1 break, `wait_ms` 0 for ever."""

    cluster_size: int
    on_full: int
    memory_limit: int
    scratch_limit: int
    scratch_fd: int
    wait_ms: int
    token: int


@dataclass(frozen=True, slots=True)
class CopierOptions:
    """See ``struct nb_copier_options``: `max_workers` 1..64, `chunk` in bytes."""

    max_workers: int
    chunk: int
    target_is_zero: bool
    detect_zeroes: bool
    background: bool


class ImageFault(KernelError):
    """nb_qcow2_open found damaged metadata: which table, which entry, where in the file, which value."""

    def __init__(self, what: str, errno: int, kind: FaultKind, index: int, offset: int, value: int) -> None:
        super().__init__(what, errno)
        self.fault = kind
        self.index = index
        self.offset = offset
        self.value = value


def _check(result: int, what: str) -> int:
    if result < 0:
        raise KernelError(what, -result)
    return result


def _struct(name: str, fields: object) -> Any:
    return _ffi.new(
        f"struct {name} *", {slot: getattr(fields, slot) for slot in type(fields).__dict__["__slots__"]}
    )


def _pointer(handle: Node | Bitmap | None) -> Any:
    return _ffi.NULL if handle is None else handle.pointer


class _Handle:
    """Owns one C reference, until `close`."""

    _drop: Callable[[Any], None]

    __slots__ = ("_pointer",)

    def __init__(self, pointer: Any) -> None:
        self._pointer = _ffi.gc(pointer, type(self)._drop)

    @property
    def pointer(self) -> Any:
        """The C handle; a closed one must not reach the kernel, which would crash."""
        if self._pointer is None:
            raise RuntimeError(f"use of a closed {type(self).__name__} handle; please report this")
        return self._pointer

    def close(self) -> None:
        """Drop the reference now. May block for the last reference of a node. A second call does nothing."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            _ffi.release(pointer)

    def _disown(self) -> None:
        """The reference went elsewhere: only forget it."""
        _ffi.gc(self.pointer, None)
        self._pointer = None


class Node(_Handle):
    """A node of the kernel's graph."""

    __slots__ = ()
    _drop = _lib.nb_node_unref

    @property
    def size(self) -> int:
        """Bytes of the guest's disk. Any thread."""
        return int(_lib.nb_node_size(self.pointer))

    @property
    def driver(self) -> str:
        """The driver's name as blockdev-add has it. Any thread."""
        return str(_ffi.string(_lib.nb_node_driver(self.pointer)).decode())

    @property
    def read_only(self) -> bool:
        """Whether writes fail with EROFS. Any thread."""
        return bool(_lib.nb_node_read_only(self.pointer))

    def allocated(self) -> int:
        """Bytes the node's own file takes on its filesystem. Any thread."""
        return _check(_lib.nb_node_allocated(self.pointer), "cannot tell the allocated size")

    def ref(self) -> Self:
        """A second handle to the same node. Any thread."""
        return type(self)(_lib.nb_node_ref(self.pointer))

    def set_id(self, node_id: int) -> None:
        """The number that events and extents name the node by; once, before use. Loop."""
        _lib.nb_node_set_id(self.pointer, node_id)

    def set_backing(self, backing: Node | None) -> None:
        """Replace the backing child; every export above must be drained. Loop."""
        _check(_lib.nb_node_set_backing(self.pointer, _pointer(backing)), "cannot replace the backing node")

    def abort_nbd(self) -> None:
        """Fail everything in flight, and all that follows, on the connections of the NBD node that this is or
        reaches through file children; nothing without one, or when closed. Any thread.
        """
        if self._pointer is not None:
            _lib.nb_nbd_abort(self._pointer)

    def pread(self, count: int, offset: int) -> bytes:
        """Read exactly `count` bytes. Any thread; blocks."""
        buffer = _ffi.new("char[]", count)
        _check(
            _lib.nb_node_pread(self.pointer, buffer, count, offset), f"cannot read {count} bytes at {offset}"
        )
        return bytes(_ffi.buffer(buffer, count))

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        """Write all of `data`. Any thread; blocks."""
        count = len(data)
        result = _lib.nb_node_pwrite(self.pointer, _ffi.from_buffer(data), count, offset, flags)
        _check(result, f"cannot write {count} bytes at {offset}")

    def zero(self, count: int, offset: int, flags: int = 0) -> None:
        """Make the range read as zeroes. Any thread; blocks."""
        _check(
            _lib.nb_node_zero(self.pointer, count, offset, flags), f"cannot zero {count} bytes at {offset}"
        )

    def discard(self, count: int, offset: int) -> None:
        """Tell that the range is not needed. Any thread; blocks."""
        _check(_lib.nb_node_discard(self.pointer, count, offset), f"cannot discard {count} bytes at {offset}")

    def flush(self) -> None:
        """Make everything written durable. Any thread; blocks."""
        _check(_lib.nb_node_flush(self.pointer), "cannot flush")

    def write_back(self) -> None:
        """Write back cached metadata without waiting for the disk. Any thread; blocks."""
        _check(_lib.nb_node_write_back(self.pointer), "cannot write metadata back")

    def block_status(
        self, offset: int, count: int, base: Node | None = None, capacity: int = 1024
    ) -> list[Extent]:
        """At most `capacity` extents from `offset` on, through the whole chain above `base`. Any thread;
        blocks.
        """
        found = _ffi.new("struct nb_extent[]", capacity)
        arguments = (self.pointer, _pointer(base), offset, count, found, capacity)
        used = _check(_lib.nb_node_block_status(*arguments), f"cannot map {count} bytes at {offset}")
        return [_extent(found[i]) for i in range(used)]

    def start_flush(self, token: int) -> None:
        """`flush` in the pool; EventKind.TASK with `token` follows. Loop."""
        _check(_lib.nb_task_flush(self.pointer, token), "cannot start a flush")

    def start_write_back(self, token: int) -> None:
        """`write_back` in the pool; EventKind.TASK with `token` follows. Loop."""
        _check(_lib.nb_task_write_back(self.pointer, token), "cannot start writing metadata back")

    def start_close(self, token: int) -> None:
        """`close` in the pool; EventKind.TASK with `token` follows. The handle is closed at once. Loop."""
        _check(_lib.nb_task_unref(self.pointer, token), "cannot start closing a node")
        self._disown()


def _extent(raw: Any) -> Extent:
    return Extent(raw.offset, raw.length, ExtentFlag(raw.flags), raw.depth, raw.host_offset, raw.node_id)


def file_open(path: str, flags: NodeFlag) -> Node:
    """Open a regular file or block device. Blocks."""
    out = _ffi.new("struct node **")
    _check(_lib.nb_file_open(path.encode(errors="surrogateescape"), flags, out), f"Could not open '{path}'")
    return Node(out[0])


def raw_open(child: Node, offset: int, size: int, flags: NodeFlag) -> Node:
    """A window of `size` bytes (0: to the end) of `child` from `offset` on. Loop."""
    out = _ffi.new("struct node **")
    _check(_lib.nb_raw_open(child.pointer, offset, size, flags, out), "Could not open a raw view")
    return Node(out[0])


def qcow2_open(file: Node, backing: Node | None, layout: Qcow2Layout, flags: NodeFlag) -> Node:
    """A qcow2 layer in `file`; raises ImageFault when its tables are damaged. Blocks."""
    out, fault = _ffi.new("struct node **"), _ffi.new("struct nb_fault *")
    arguments = (file.pointer, _pointer(backing), _struct("nb_qcow2_layout", layout), flags, out, fault)
    result = _lib.nb_qcow2_open(*arguments)
    if result < 0 and fault.kind != FaultKind.NONE:
        kind = FaultKind(fault.kind)
        raise ImageFault("damaged qcow2 metadata", -result, kind, fault.index, fault.offset, fault.value)
    _check(result, "Could not open qcow2 metadata")
    return Node(out[0])


def null_open(size: int, latency_ns: int, read_zeroes: bool, flags: NodeFlag) -> Node:
    """A node that forgets what is written. Loop."""
    out = _ffi.new("struct node **")
    _check(_lib.nb_null_open(size, latency_ns, read_zeroes, flags, out), "Could not make a null node")
    return Node(out[0])


def nbd_open(uri: str, connections: int, flags: NodeFlag) -> Node:
    """An NBD server's export as a node; the error carries libnbd's reason as its hint. Blocks."""
    out, message = _ffi.new("struct node **"), _ffi.new("char **")
    result = _lib.nb_nbd_open(uri.encode(), connections, flags, out, message)
    if result < 0:
        reason = ""
        if message[0] != _ffi.NULL:
            reason = _ffi.string(message[0]).decode(errors="replace")
            _lib.nb_string_free(message[0])
        raise KernelError(f"Could not open '{uri}'", -result, hint=reason)
    return Node(out[0])


def error_inject_open(child: Node, flags: NodeFlag) -> Node:
    """Faults in front of `child`. Loop."""
    out = _ffi.new("struct node **")
    _check(_lib.nb_error_inject_open(child.pointer, flags, out), "Could not make an error-inject node")
    return Node(out[0])


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """What an error-inject node does: see nb_error_inject_rule. `operations` is a mask; `error` a positive
    errno.
    """

    operations: int
    offset: int
    length: int
    error: int
    delay_ns: int
    skip: int
    count: int


def error_inject_rule(node: Node, rule: ErrorRule) -> None:
    """Add a rule to a node of driver error-inject. Any thread."""
    result = _lib.nb_error_inject_rule(
        node.pointer,
        rule.operations,
        rule.offset,
        rule.length,
        rule.error,
        rule.delay_ns,
        rule.skip,
        rule.count,
    )
    _check(result, "Could not add a fault rule")


class Export(_Handle):
    """A disk that NBD clients see; registered by name until `unregister`."""

    __slots__ = ()
    _drop = _lib.nb_export_unref

    @classmethod
    def new(cls, name: str, root: Node, writable: bool) -> Self:
        """Register an export of `root`; EEXIST when the name is taken. Loop."""
        out = _ffi.new("struct export **")
        _check(_lib.nb_export_new(name.encode(), root.pointer, writable, out), f"Could not export '{name}'")
        return cls(out[0])

    @classmethod
    def find(cls, name: str) -> Self | None:
        """The registered export of that name. Any thread."""
        found = _lib.nb_export_find(name.encode())
        return cls(found) if found != _ffi.NULL else None

    def unregister(self) -> None:
        """Take the name away; connected clients go on. Loop."""
        _lib.nb_export_unregister(self.pointer)

    def kill(self) -> None:
        """Fail all further requests with ESHUTDOWN and disconnect their clients. Loop."""
        _lib.nb_export_kill(self.pointer)

    @property
    def clients(self) -> int:
        """How many clients have it open. Any thread."""
        return int(_lib.nb_export_clients(self.pointer))

    def count_client(self, change: int) -> None:
        """Count a client in (+1) or out (-1); only without the filter, which does so itself. Any thread."""
        _lib.nb_export_client(self.pointer, change)

    @property
    def writable(self) -> bool:
        """Whether guests may write. Any thread."""
        return bool(_lib.nb_export_writable(self.pointer))

    @property
    def size(self) -> int:
        """Bytes of the disk. Any thread."""
        return int(_lib.nb_export_size(self.pointer))

    def counters(self) -> Counters:
        """What it has done so far. Any thread."""
        raw = _ffi.new("struct nb_counters *")
        _lib.nb_export_counters(self.pointer, raw)
        return Counters(*(getattr(raw, field) for field in Counters._fields))

    def close_gate(self, token: int) -> None:
        """Make new requests wait; EventKind.DRAINED with `token` follows when none is in flight. Counted.
        Loop.
        """
        _lib.nb_export_close_gate(self.pointer, token)

    def open_gate(self) -> None:
        """Undo one `close_gate`. Loop."""
        _lib.nb_export_open_gate(self.pointer)

    def set_root(self, root: Node) -> None:
        """Serve another node from now on; the gate must be closed and drained. Loop."""
        _check(_lib.nb_export_set_root(self.pointer, root.pointer), "Could not change an export's root")

    def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer`. Any thread; blocks."""
        target = _ffi.from_buffer(buffer, require_writable=True)
        _check(_lib.nb_export_pread(self.pointer, target, len(buffer), offset), "read")

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        """Write all of `data`. Any thread; blocks."""
        _check(_lib.nb_export_pwrite(self.pointer, _ffi.from_buffer(data), len(data), offset, flags), "write")

    def zero(self, count: int, offset: int, flags: int = 0) -> None:
        """Make the range read as zeroes. Any thread; blocks."""
        _check(_lib.nb_export_zero(self.pointer, count, offset, flags), "zero")

    def trim(self, count: int, offset: int, flags: int = 0) -> None:
        """Tell that the range is not needed. Any thread; blocks."""
        _check(_lib.nb_export_trim(self.pointer, count, offset, flags), "trim")

    def flush(self) -> None:
        """Make everything written durable. Any thread; blocks."""
        _check(_lib.nb_export_flush(self.pointer), "flush")

    def cache(self, count: int, offset: int) -> None:
        """Prefetch. Any thread; blocks."""
        _check(_lib.nb_export_cache(self.pointer, count, offset), "cache")

    def extents(self, count: int, offset: int, capacity: int = 1024) -> list[Extent]:
        """Block status of the range, at most `capacity` extents. Any thread; blocks."""
        found = _ffi.new("struct nb_extent[]", capacity)
        used = _check(_lib.nb_export_extents(self.pointer, count, offset, found, capacity), "extents")
        return [_extent(found[i]) for i in range(used)]


class Bitmap(_Handle):
    """A dirty bitmap. Every method but `start_set_allocated` may be called from any thread."""

    __slots__ = ()
    _drop = _lib.nb_bitmap_free

    @classmethod
    def new(cls, size: int, granularity: int) -> Self:
        """A clean bitmap of a disk of `size` bytes; granularity a power of two, 512 B to 2 GiB."""
        out = _ffi.new("struct bitmap **")
        _check(
            _lib.nb_bitmap_new(size, granularity, out),
            f"Could not make a bitmap of granularity {granularity}",
        )
        return cls(out[0])

    @property
    def granularity(self) -> int:
        """Bytes per bit."""
        return int(_lib.nb_bitmap_granularity(self.pointer))

    @property
    def size(self) -> int:
        """Bytes of the disk it describes."""
        return int(_lib.nb_bitmap_size(self.pointer))

    @property
    def dirty_bytes(self) -> int:
        """Bytes of dirty granules; exact when nobody changes it meanwhile."""
        return int(_lib.nb_bitmap_dirty_bytes(self.pointer))

    def set(self, offset: int, count: int) -> None:
        """Set every granule that the range touches."""
        _lib.nb_bitmap_set(self.pointer, offset, count)

    def clear(self, offset: int, count: int) -> None:
        """Clear every granule wholly inside the range."""
        _lib.nb_bitmap_clear(self.pointer, offset, count)

    def test(self, offset: int, count: int) -> bool:
        """Whether any granule of the range is set."""
        return bool(_lib.nb_bitmap_test(self.pointer, offset, count))

    def next_dirty(self, offset: int, limit: int) -> tuple[int, int] | None:
        """Start and length of the first dirty area at or after `offset`, at most `limit` bytes; None if
        clean.
        """
        area = _ffi.new("uint64_t[2]")
        found = _lib.nb_bitmap_next_dirty(self.pointer, offset, limit, area, area + 1)
        return (int(area[0]), int(area[1])) if found else None

    def merge(self, source: Bitmap) -> None:
        """OR `source` in; EINVAL when the disks differ in size."""
        _check(_lib.nb_bitmap_merge(self.pointer, source.pointer), "Could not merge bitmaps")

    def start_set_allocated(self, node: Node, base: Node | None, skip_zero: bool, token: int) -> None:
        """Set what `node` has allocated above `base`, in the pool; EventKind.TASK follows. Loop."""
        result = _lib.nb_bitmap_set_allocated(self.pointer, node.pointer, _pointer(base), skip_zero, token)
        _check(result, "Could not start to read the allocation")


def cbw_open(source: Node, todo: Bitmap, options: CbwOptions) -> Node:
    """A copy-before-write filter over `source`, which owns `todo` from now on: the handle stays usable to
    read, but only as long as the node lives. Loop.
    """
    out = _ffi.new("struct node **")
    result = _lib.nb_cbw_open(source.pointer, todo.pointer, _struct("nb_cbw_options", options), out)
    _check(result, "Could not make a copy-before-write node")
    _ffi.gc(todo.pointer, None)  # no longer freed with the handle
    return Node(out[0])


def cbw_release(cbw: Node) -> None:
    """Stop intercepting; waiting guest writes go on. Any thread."""
    _lib.nb_cbw_release(cbw.pointer)


def cbw_usage(cbw: Node) -> CbwUsage:
    """How full the local store is. Any thread."""
    values = _ffi.new("uint64_t[4]")
    _lib.nb_cbw_usage(cbw.pointer, values, values + 1, values + 2, values + 3)
    return CbwUsage(*(int(value) for value in values))


class Copier(_Handle):
    """A background copy. One slice at a time; close it only when none runs."""

    __slots__ = ()

    @staticmethod
    def _drop(pointer: Any) -> None:
        _check(_lib.nb_copier_free(pointer), "Could not free a copier: a slice is still running")

    @classmethod
    def new(
        cls, source: Node, target: Node, todo: Bitmap | None, cbw: Node | None, options: CopierOptions
    ) -> Self:
        """Copies what `todo` (not owned) or `cbw` has dirty from `source` to `target`. Loop."""
        out = _ffi.new("struct copier **")
        raw = _struct("nb_copier_options", options)
        arguments = (source.pointer, target.pointer, _pointer(todo), _pointer(cbw), raw, out)
        _check(_lib.nb_copier_new(*arguments), "Could not make a copier")
        return cls(out[0])

    def start_slice(self, max_bytes: int, max_ms: int, store_only: bool, token: int) -> None:
        """Copy for a while; EventKind.SLICE with `token` follows. EBUSY while another slice runs. Loop."""
        result = _lib.nb_copier_slice(self.pointer, max_bytes, max_ms, store_only, token)
        _check(result, "Could not start a slice of a copy")

    @property
    def remaining(self) -> int:
        """Bytes left to do: dirty, being copied, stored. Any thread."""
        return int(_lib.nb_copier_remaining(self.pointer))

    def stop(self) -> None:
        """End a running slice early; its event still comes. Any thread."""
        _lib.nb_copier_stop(self.pointer)


def ring_fd() -> int:
    """The eventfd that is readable while events wait; never closed. Loop."""
    return _check(_lib.nb_ring_fd(), "Could not make the event ring")


_EVENTS_AT_ONCE = 64


def ring_read() -> list[Event]:
    """The waiting events, oldest first, at most 64; the eventfd stays readable when more wait. Loop."""
    raw = _ffi.new("struct nb_event[]", _EVENTS_AT_ONCE)
    count = _check(_lib.nb_ring_read(raw, _EVENTS_AT_ONCE), "Could not read the event ring")
    return [
        Event(EventKind(e.kind), -e.error, e.token, e.a, e.b, e.c) for e in (raw[i] for i in range(count))
    ]


def nbdkit_version() -> str:
    """The nbdkit version that the filter was built for. Any thread."""
    return str(_ffi.string(_lib.nb_nbdkit_version()).decode())


def filter_loaded() -> bool:
    """Whether nbdkit has loaded this module as its filter in this process. Any thread."""
    return bool(_lib.nb_filter_loaded())


def module_path() -> str:
    """The shared object to give to nbdkit as ``--filter``."""
    return str(_kernel.__file__)
