"""Backup: a copy of the disk as it was at one moment, while the guest goes on writing.

Point in time
    `set_up` puts a copy-before-write filter above the source, with the exports above it drained: that is the
    moment. From then on a guest's write to a cluster that is not copied yet first puts the old data into a
    local store (memory, then a scratch file), never into the target; the job's slices carry the store to the
    target, ahead of their own copying.

What is taken is given back by `clean` in reverse order: claims, scratch file, filter, copier.

What is copied (`sync`): full, everything; top, what the top layer has allocated; none, nothing but what
guests overwrite, until the job is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from jobs.block.blockjob import BlockJob
from jobs.block.copyloop import CopyLoop, ErrorPolicies
from jobs.errors import JobError
from jobs.onerror import OnError
from nbd_backend.block import kernel
from nbd_backend.block.errors import BlockError, KernelError
from nbd_backend.block.graph import Graph
from nbd_backend.block.kernel import (
    Bitmap,
    CbwOptions,
    Copier,
    CopierOptions,
    Event,
    EventKind,
    ExtentFlag,
    Side,
)
from nbd_backend.block.node import BlockNode
from nbd_backend.block.permissions import READ, Access, Holder, HolderKind
from nbd_backend.block.scratch import open_scratch
from nbd_backend.block.threads import run_blocking

__all__ = ["BackupJob", "BackupOptions", "BackupTuning", "CbwOnError", "check_options"]

log = logging.getLogger(__name__)

MIN_CLUSTER = 64 << 10
MAX_CLUSTER = 64 << 20
DEFAULT_MEMORY = 128 << 20
LOCAL_WORKERS = 1
REMOTE_WORKERS = 8
MAX_WORKERS = 64
DEFAULT_CHUNK = 1 << 20
MAX_CHUNK = 16 << 20
NO_SCRATCH = -1
CANCEL_GRACE = 2.0
"""Seconds that a target at another server has for what is in flight when the backup is cancelled."""
_SOURCE, _TARGET = "backup source", "backup target"
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
ScratchSize = Annotated[int, msgspec.Meta(ge=NO_SCRATCH, le=2**63 - 1)]
CbwOnError = Literal["break-guest-write", "break-snapshot"]
OptionsType = type[msgspec.Struct]  # named here because the attribute `type` below hides the builtin


class BackupTuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """x-perf: how hard the background copy works. Sizes in bytes; ``max-chunk`` 0 is no limit.

    ``max-workers`` is by default 1 for a local target and 8 for one at another server.
    """

    use_copy_range: bool = False
    max_workers: Int64 | msgspec.UnsetType = msgspec.UNSET
    max_chunk: Int64 = 0
    min_cluster_size: Size = 0


class BackupOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What a backup is told, whoever starts it.

    Ours: ``on-cbw-error`` says what happens when the local store is full: guest writes wait for room (the
    default, as with no policy), or, with ``break-snapshot``, the backup fails. ``cbw-timeout`` is how many
    seconds a guest write may wait before the backup fails, 0 for ever. ``cbw-memory`` and ``cbw-scratch``
    bound the store's two parts in bytes; ``cbw-scratch`` 0 is no bound but the filesystem's, -1 no file.
    """

    device: str
    target: str
    sync: Literal["full", "top", "none"]
    speed: Int64 = 0
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    compress: bool = False
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | None = None
    x_perf: BackupTuning = BackupTuning()
    on_cbw_error: CbwOnError = "break-guest-write"
    cbw_timeout: Size = 0
    cbw_memory: Size = DEFAULT_MEMORY
    cbw_scratch: ScratchSize = 0


class BackupJob(BlockJob):
    """One backup. Loop thread only."""

    type: ClassVar[str] = "backup"
    options: ClassVar[OptionsType] = BackupOptions

    def __init__(
        self, graph: Graph, options: BackupOptions, scratch_dir: str, *, owns_target: bool = False
    ) -> None:
        """Checks everything that can be checked without changing anything; raises JobError or BlockError.

        ``scratch_dir`` is the directory of the store's file. ``owns_target``: the target node is the job's
        own from `set_up` on, and is removed at the end.
        """
        source, target = graph.get(options.device), graph.get(options.target)
        _check_nodes(source, target)
        check_options(options, target.name)
        if source.size != target.size:
            raise JobError("Source and target image have different sizes")
        super().__init__(
            device=source.name,
            speed=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        self._graph = graph
        self._options = options
        self._source, self._target = source, target
        self._cluster_size = _cluster_size(options, target)
        _check_store(options, self._cluster_size)
        self._scratch_dir = scratch_dir
        self._owns_target = owns_target
        self._taken = AsyncExitStack()
        self._filter: BlockNode | None = None
        self._copier: Copier | None = None
        self._broken: JobError | None = None
        self._stored = False
        self._full_at = 0  # bytes in the store when it was last full

    @classmethod
    def create(cls, context: Any, options: BackupOptions) -> BackupJob:
        """A backup for job-create, between two nodes."""
        return cls(context.graph, options, context.scratch_dir)

    # ---- setting up ----

    async def set_up(self) -> None:
        """Take the point in time. When it raises, nothing has changed; a target that the job owns is gone."""
        try:
            self._claim_nodes()
            self._todo = Bitmap.new(self._source.size, self._cluster_size)
            self._todo.set(0, self._source.size)
            self._filter = await self._insert_filter(self._take_scratch())
            self._taken.push_async_callback(self._remove_filter, self._filter)
        except BaseException:
            await self.clean()
            raise
        self.progress.set_remaining(self._source.size)

    def _claim_nodes(self) -> None:
        if self._owns_target:
            self._taken.push_async_callback(self._remove_target)
        sharing = READ | {Access.WRITE, Access.WRITE_UNCHANGED}
        self._claim(self._source, _SOURCE, uses=READ, shares=sharing)
        self._claim(self._target, _TARGET, uses=frozenset({Access.WRITE}), shares=READ)

    def _claim(
        self, node: BlockNode, role: str, *, uses: frozenset[Access], shares: frozenset[Access]
    ) -> None:
        """Claim a node, and be held still while what lies below it changes."""
        permissions = self._graph.permissions
        for holder in permissions.holders(node):
            # A job's writes do not pass the filter of another, which could not keep the old data.
            if holder.kind is HolderKind.JOB and holder.detail != role:
                raise JobError(f"Node '{node.name}' is busy: it is in use by {holder}: {holder.way_out}")
        claim = permissions.acquire(node, Holder(HolderKind.JOB, self.name, role), uses=uses, shares=shares)
        self._taken.callback(claim.release)
        self._taken.callback(self._graph.use_in_background(node, self.quiesced))

    def _take_scratch(self) -> int:
        if self._options.cbw_scratch == NO_SCRATCH:
            return -1
        descriptor = open_scratch(self._scratch_dir)
        self._taken.callback(os.close, descriptor)
        return descriptor

    async def _insert_filter(self, scratch: int) -> BlockNode:
        options = CbwOptions(
            cluster_size=self._cluster_size,
            on_full=int(self._options.on_cbw_error == "break-snapshot"),
            memory_limit=self._options.cbw_memory,
            scratch_limit=max(0, self._options.cbw_scratch),
            scratch_fd=scratch,
            wait_ms=min(self._options.cbw_timeout * 1000, 2**32 - 1),
            token=self._graph.ring.new_token(),
        )
        self._taken.callback(self._graph.ring.subscribe(options.token, self._on_store_event))
        return await self._graph.insert_filter(
            self._source,
            lambda below: kernel.cbw_open(below, self._todo, options),
            self._options.filter_node_name,
        )

    async def _remove_filter(self, node: BlockNode) -> None:
        self._filter = None
        kernel.cbw_release(node.handle)  # guests that wait for room go on, else they could not be drained
        await self._graph.remove_filter(node)

    # ---- running ----

    async def run(self) -> None:
        """Copy all that `sync` asks for; with sync=none until the job is cancelled."""
        assert self._filter is not None, "a backup was started without set_up"
        with _job_errors():
            copier = self._open_copier(self._filter.handle, zero=await run_blocking(self._target_is_zero))
            policies = ErrorPolicies(self._options.on_source_error, self._options.on_target_error)
            loop = CopyLoop(self, self._graph.ring, copier, policies, self._raise_if_broken)
            if self._options.sync == "none":
                await self._carry_store(loop)
            if self._options.sync == "top":
                await self._leave_out_backing(loop)
                self.progress.set_remaining(copier.remaining)
            await loop.copy_all()
            # Whoever opens the file after the job's end finds a complete image there.
            await loop.task(Side.TARGET, self._target.handle.start_write_back)

    def _target_is_zero(self) -> bool:
        """Whether nothing needs to be written where the source reads as zeroes. Blocks."""
        if self._target.info.backing_filename is not None:
            return False  # opened without it, perhaps; but others will see it where nothing is written
        size = self._target.size
        try:
            extents = self._target.handle.block_status(0, size, capacity=1) if size else []
        except KernelError:  # it shows again where policy is asked: when the target is written
            return False
        return bool(extents and extents[0].length == size and extents[0].flags & ExtentFlag.ZERO)

    def _open_copier(self, cbw: kernel.Node, *, zero: bool) -> Copier:
        tuning = self._options.x_perf
        chunk = min(tuning.max_chunk, MAX_CHUNK) if tuning.max_chunk else DEFAULT_CHUNK
        options = CopierOptions(
            max_workers=min(_workers(tuning, self._target), MAX_WORKERS),
            chunk=max(self._cluster_size, chunk // self._cluster_size * self._cluster_size),
            target_is_zero=zero,
            detect_zeroes=False,
            background=True,
        )
        self._copier = Copier.new(cbw, self._target.handle, None, cbw, options)
        self._taken.callback(self._close_copier, self._copier)
        return self._copier

    def _close_copier(self, copier: Copier) -> None:
        self._copier = None
        copier.close()

    async def _carry_store(self, loop: CopyLoop) -> None:
        """Carry the store to the target whenever there is something in it; ends by cancel only."""
        while True:
            await self.wait_for(lambda: self._stored or self._broken is not None)
            self._stored = False
            await loop.slice(store_only=True)

    async def _leave_out_backing(self, loop: CopyLoop) -> None:
        """Take out of the work what the source's own layer has not allocated.

        It is done after the point in time: what a guest allocates meanwhile is copied needlessly, no more.
        """
        wanted = Bitmap.new(self._todo.size, self._todo.granularity)
        backing = self._source.backing
        below = backing.handle if backing is not None else None
        await loop.task(
            Side.SOURCE, lambda token: wanted.start_set_allocated(self._source.handle, below, False, token)
        )
        offset = 0
        while offset < wanted.size:
            start, length = wanted.next_dirty(offset, wanted.size) or (wanted.size, 0)
            self._todo.clear(offset, start - offset)
            offset = start + length
            await self.pause_point()

    def _on_store_event(self, event: Event) -> None:
        if event.kind is EventKind.CBW_STORED:
            self._stored = True
        elif event.kind is EventKind.CBW_FULL:
            self._full_at = event.a
        elif event.kind is EventKind.CBW_BROKEN:
            self._broken = JobError(
                f"The state of '{self._source.name}' at the start of the backup could not be kept:"
                f" {os.strerror(event.error)}"
            )
            self._hurry()
        self.wakeup.ring()

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def on_cancel(self, force: bool) -> None:
        """End the slice in flight early; without its target if that takes long."""
        self._hurry()
        asyncio.get_running_loop().call_later(CANCEL_GRACE, self._give_up_stuck_target)

    def _give_up_stuck_target(self) -> None:
        """Whoever waits for the target gets an error, if it is at another server and no guest uses it."""
        if self.started and not self.run_over and self._graph.cut_off(self._target):
            self._graph.tell_loss(self._target)
            log.error(
                "backup '%s' is cancelled, but its target '%s' does not answer: it is given up",
                self.name, self._target.name,
            )  # fmt: skip

    def _hurry(self) -> None:
        if self._copier is not None:
            self._copier.stop()

    @property
    def stall(self) -> str | None:
        """As for all jobs; but first that guests wait for this one."""
        return "the local store is full: guest writes wait" if self._is_full() else super().stall

    def _is_full(self) -> bool:
        """Whether the store is as full as the kernel has told; it tells again once half of it was free."""
        if self._filter is None or not self._full_at:
            return False
        usage = kernel.cbw_usage(self._filter.handle)
        return usage.memory + usage.scratch > self._full_at // 2

    def extra_info(self) -> dict[str, Any]:
        """The local store: bytes in its two parts, and guest writes that waited."""
        if self._filter is None:
            return {}
        usage = kernel.cbw_usage(self._filter.handle)
        return {"cbw-memory": usage.memory, "cbw-scratch": usage.scratch, "cbw-waits": usage.waits}

    # ---- the end ----

    def commit(self) -> None:
        """Begin to make the target durable.

        Not awaited: a job is over when the data is copied. `clean` flushes a target that the job owns.
        """
        if not self._owns_target:
            self._graph.ring.event(self._target.handle.start_flush).add_done_callback(self._flushed)

    def _flushed(self, ended: Any) -> None:
        if not ended.cancelled() and (error := ended.result().error):
            log.error(
                "backup '%s' is complete, but its target '%s' could not be flushed: %s",
                self.name, self._target.name, os.strerror(error),
            )  # fmt: skip

    def abort(self) -> None:
        """Nobody relies on the target now: its user hears that the backup failed or is cancelled."""
        meant = self.force_cancelled and self._options.sync == "none"  # its only end
        if self.started and not meant:
            self._graph.tell_loss(self._target)

    async def _remove_target(self) -> None:
        """Remove the job's own target even if its flush fails, which fails the job if nothing else has."""
        try:
            await self._graph.remove(self._target.name)
        except KernelError:
            await self._graph.remove(self._target.name)
            raise

    async def clean(self) -> None:
        """Give back what was taken, the last first, as far as `set_up` went. A second call does nothing."""
        with _job_errors():
            await self._taken.aclose()


@contextmanager
def _job_errors() -> Iterator[None]:
    """What the block layer refuses or fails at is the job's failure, not a defect in it."""
    try:
        yield
    except BlockError as error:
        raise JobError(str(error)) from error


def check_options(options: BackupOptions, target: str) -> None:
    """Refuse options that no pair of nodes could make right; ``target`` is what messages name."""
    tuning = options.x_perf
    if options.compress:
        raise JobError(f"Compression is not supported for this drive {target}")
    workers = tuning.max_workers
    if not isinstance(workers, msgspec.UnsetType) and not 1 <= workers <= 2**31 - 1:
        raise JobError("max-workers must be between 1 and 2147483647")
    if tuning.max_chunk < 0:
        raise JobError("max-chunk must be zero (which means no limit) or positive")
    if tuning.min_cluster_size & (tuning.min_cluster_size - 1):
        raise JobError("min-cluster-size needs to be a power of 2")
    if tuning.min_cluster_size > MAX_CLUSTER:
        raise JobError(f"min-cluster-size too large: {tuning.min_cluster_size} > {MAX_CLUSTER}")


def _cluster_size(options: BackupOptions, target: BlockNode) -> int:
    """Bytes that are kept at once when a guest changes any of them."""
    return max(MIN_CLUSTER, target.info.cluster_size or 0, options.x_perf.min_cluster_size)


def _workers(tuning: BackupTuning, target: BlockNode) -> int:
    """Copies in flight: more than one disturb each other on a local disk; a server far away needs more."""
    if not isinstance(tuning.max_workers, msgspec.UnsetType):
        return tuning.max_workers
    node: BlockNode | None = target
    while node is not None:
        if node.driver == "nbd":
            return REMOTE_WORKERS
        node = node.file
    return LOCAL_WORKERS


def _check_nodes(source: BlockNode, target: BlockNode) -> None:
    if source is target:
        raise JobError("Source and target cannot be the same")
    for node in (source, target):
        if node.in_place:
            raise JobError(f"Node '{node.name}' is busy: it is a job's filter: name the node below it")


def _check_store(options: BackupOptions, cluster: int) -> None:
    """A store without room for one cluster would break the backup at the guest's first write."""
    scratch = options.cbw_scratch
    if options.cbw_memory < cluster and scratch != 0 and scratch < cluster:
        raise JobError(
            f"The local store cannot hold one cluster of {cluster} bytes: cbw-memory is {options.cbw_memory},"
            f" cbw-scratch is {scratch}; raise one of them"
        )
