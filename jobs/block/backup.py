"""Backup: a copy of the disk as it was at one moment, while the guest goes on writing.

Point in time
    `set_up` puts a copy-before-write filter above the source, with the exports above it drained: that is the
    moment. From then on a guest's write to a cluster that is not copied yet first puts the old data into a
    local store (memory, then a scratch file), never into the target; the job's slices carry the store to the
    target, ahead of their own copying.

States of the set-up, each undone by `clean` in reverse: claimed (permissions), filter inserted, copier made.

What is copied (`sync`): full, everything; top, what the top layer has allocated; none, nothing but what guests
overwrite, until the job is cancelled.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from jobs.block.blockjob import BlockJob
from jobs.block.copyloop import CopyLoop, ErrorPolicies
from jobs.errors import JobError
from jobs.onerror import OnError
from nbd_backend.block import kernel
from nbd_backend.block.graph import Graph
from nbd_backend.block.kernel import Bitmap, CbwOptions, Copier, CopierOptions, Event, EventKind, ExtentFlag
from nbd_backend.block.node import BlockNode
from nbd_backend.block.permissions import READ, Access, Holder, HolderKind, Permission
from nbd_backend.block.scratch import open_scratch

__all__ = ["BackupJob", "BackupOptions", "BackupTuning", "CbwOnError"]

DEFAULT_CLUSTER = 64 << 10
DEFAULT_MEMORY = 64 << 20
DEFAULT_WORKERS = 4
MOST_WORKERS = 64
CHUNK = 1 << 20
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
CbwOnError = Literal["break-guest-write", "break-snapshot"]
OptionsType = type[msgspec.Struct]  # named here because the attribute `type` below hides the builtin


class BackupTuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """x-perf: how hard the background copy works. Sizes in bytes; ``max-chunk`` 0 is no limit."""

    use_copy_range: bool = False
    max_workers: Int64 = DEFAULT_WORKERS
    max_chunk: Int64 = 0
    min_cluster_size: Size = 0


class BackupOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What a backup is told, whoever starts it.

    Ours: ``on-cbw-error`` says what happens when the local store is full: guest writes wait for room (the
    default, as with no policy), or, with ``break-snapshot``, the backup fails. ``cbw-timeout`` is how many
    seconds a guest write may wait before the backup fails, 0 for ever. ``cbw-memory`` and ``cbw-scratch`` bound
    the store's two parts in bytes; ``cbw-scratch`` 0 is no bound but the filesystem's, -1 no scratch file.
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
    cbw_scratch: Int64 = 0


class BackupJob(BlockJob):
    """One backup. Loop thread only."""

    type: ClassVar[str] = "backup"
    options: ClassVar[OptionsType] = BackupOptions

    def __init__(
        self, graph: Graph, options: BackupOptions, scratch_dir: str, *, owns_target: bool = False
    ) -> None:
        """Checks everything that can be checked without changing anything; raises JobError or BlockError.

        ``owns_target``: the target node is the job's own, and is removed at the end.
        """
        source, target = _find(graph, options.device), _find(graph, options.target)
        super().__init__(
            device=source.name,
            speed=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        _check(options, source, target)
        self._graph = graph
        self._options = options
        self._scratch_dir = scratch_dir
        self._owns_target = owns_target
        self._source, self._target = source, target
        self._claims: list[Permission] = []
        self._scratch = -1
        self._filter: BlockNode | None = None
        self._copier: Copier | None = None
        self._unsubscribe: Any = None
        self._broken: JobError | None = None
        self._stored = False
        self._full = False

    @classmethod
    def create(cls, context: Any, options: BackupOptions) -> BackupJob:
        """For job-create; `set_up` has to follow."""
        return cls(context.graph, options, context.scratch_dir)

    # ---- setting up ----

    async def set_up(self) -> None:
        """Take the point in time. When it raises, nothing has changed."""
        try:
            self._claim()
            if self._options.cbw_scratch >= 0:
                self._scratch = open_scratch(self._scratch_dir)
            todo = Bitmap.new(self._source.size, self._cluster_size())
            todo.set(0, self._source.size)
            target_is_zero = await self._target_is_zero()
            self._filter = await self._insert_filter(todo)
            self._copier = self._make_copier(self._filter, target_is_zero)
            self.progress.set_remaining(self._copier.remaining)
            self._todo = todo
        except BaseException:
            await self.clean()
            raise

    def _claim(self) -> None:
        holder = Holder(HolderKind.JOB, self.name, self.type)
        acquire = self._graph.permissions.acquire
        sharing = READ | {Access.WRITE, Access.WRITE_UNCHANGED}
        self._claims.append(acquire(self._source, holder, uses=READ, shares=sharing))
        self._claims.append(acquire(self._target, holder, uses=frozenset({Access.WRITE}), shares=READ))

    def _cluster_size(self) -> int:
        target = self._target.info.cluster_size or DEFAULT_CLUSTER
        return max(DEFAULT_CLUSTER, target, self._options.x_perf.min_cluster_size)

    async def _target_is_zero(self) -> bool:
        """Whether nothing needs to be written where the source reads as zeroes."""

        def look() -> bool:
            size = self._target.size
            extents = self._target.handle.block_status(0, size, capacity=1) if size else []
            return bool(extents and extents[0].length == size and extents[0].flags & ExtentFlag.ZERO)

        return await asyncio.to_thread(look)

    async def _insert_filter(self, todo: Bitmap) -> BlockNode:
        token = self._graph.ring.new_token()
        self._unsubscribe = self._graph.ring.subscribe(token, self._on_store_event)
        options = CbwOptions(
            cluster_size=todo.granularity,
            on_full=int(self._options.on_cbw_error == "break-snapshot"),
            memory_limit=self._options.cbw_memory,
            scratch_limit=max(0, self._options.cbw_scratch),
            scratch_fd=self._scratch,
            wait_ms=min(self._options.cbw_timeout * 1000, 2**32 - 1),
            token=token,
        )
        return await self._graph.insert_filter(
            self._source,
            lambda below: kernel.cbw_open(below, todo, options),
            self._options.filter_node_name,
        )

    def _make_copier(self, cbw: BlockNode, target_is_zero: bool) -> Copier:
        tuning = self._options.x_perf
        chunk = max(CHUNK, self._cluster_size())
        if tuning.max_chunk:
            chunk = max(self._cluster_size(), tuning.max_chunk // self._cluster_size() * self._cluster_size())
        options = CopierOptions(
            max_workers=min(tuning.max_workers, MOST_WORKERS),
            chunk=chunk,
            target_is_zero=target_is_zero,
            detect_zeroes=False,
            background=True,
        )
        return Copier.new(cbw.handle, self._target.handle, None, cbw.handle, options)

    # ---- running ----

    async def run(self) -> None:
        assert self._copier is not None, "a backup was started without set_up"
        policies = ErrorPolicies(self._options.on_source_error, self._options.on_target_error)
        loop = CopyLoop(self, self._graph.ring, self._copier, policies, self._raise_if_broken)
        if self._options.sync == "none":
            await self._serve_store(loop)
        if self._options.sync == "top":
            await self._leave_out_backing()
        await loop.copy_all()
        # Whoever opens the file after the job's end finds a complete image there.
        await self.uninterrupted(
            self._graph.ring.run(self._target.handle.start_write_back, "Could not write back the target")
        )

    async def _serve_store(self, loop: CopyLoop) -> None:
        """Carry the store to the target whenever there is something in it; ends by cancel only."""
        while True:
            self._raise_if_broken()
            if self._stored:
                self._stored = False
                await loop.slice(store_only=True)
            else:
                await self.nap()

    async def _leave_out_backing(self) -> None:
        """Take out of the work what the source's own layer has not allocated.

        It is done after the point in time: what a guest allocates meanwhile is copied needlessly, no more.
        """
        backing = self._source.backing
        wanted = Bitmap.new(self._todo.size, self._todo.granularity)
        start = wanted.start_set_allocated
        below = backing.handle if backing is not None else None
        await self.uninterrupted(
            self._graph.ring.run(
                lambda token: start(self._source.handle, below, False, token), "Could not read the allocation"
            )
        )
        offset = 0
        while offset < wanted.size:
            area = wanted.next_dirty(offset, wanted.size)
            end = area[0] if area else wanted.size
            self._todo.clear(offset, end - offset)
            offset = end + (area[1] if area else 0)
            await self.pause_point()
        if self._copier is not None:
            self.progress.set_remaining(self._copier.remaining)

    def _on_store_event(self, event: Event) -> None:
        if event.kind is EventKind.CBW_STORED:
            self._stored, self._full = True, False
        elif event.kind is EventKind.CBW_FULL:
            self._full = True
        elif event.kind is EventKind.CBW_BROKEN:
            self._broken = JobError(
                f"The state of '{self._source.name}' at the start of the backup could not be kept:"
                f" {os.strerror(event.error)}"
            )
            if self._copier is not None:
                self._copier.stop()
        self.wakeup.ring()

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def on_cancel(self, force: bool) -> None:
        if self._copier is not None:
            self._copier.stop()

    @property
    def stall(self) -> str | None:
        return super().stall or ("the local store is full: guest writes wait" if self._full else None)

    def extra_info(self) -> dict[str, Any]:
        if self._filter is None:
            return {}
        usage = kernel.cbw_usage(self._filter.handle)
        return {"cbw-memory": usage.memory, "cbw-scratch": usage.scratch, "cbw-waits": usage.waits}

    # ---- the end ----

    def commit(self) -> None:
        # Not awaited: a job is over when the data is copied. If it fails, the node's next flush says so again.
        self._graph.ring.event(self._target.handle.start_flush)

    async def clean(self) -> None:
        """Undo `set_up`, as far as it went. A second call does nothing."""
        if self._copier is not None:
            self._copier.close()
            self._copier = None
        if self._filter is not None:
            filter_node, self._filter = self._filter, None
            kernel.cbw_release(filter_node.handle)
            await self._graph.remove_filter(filter_node)
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        if self._scratch >= 0:
            os.close(self._scratch)
            self._scratch = -1
        while self._claims:
            self._claims.pop().release()
        if self._owns_target:
            self._owns_target = False
            await self._graph.remove(self._target.name)


def _find(graph: Graph, name: str) -> BlockNode:
    node = graph.find(name)
    if node is None:
        raise JobError(f"Cannot find device='{name}' nor node-name='{name}'")
    return node


def _check(options: BackupOptions, source: BlockNode, target: BlockNode) -> None:
    tuning = options.x_perf
    if source is target:
        raise JobError("Source and target cannot be the same")
    if source.size != target.size:
        raise JobError("Source and target image have different sizes")
    if not 1 <= tuning.max_workers <= 2**31 - 1:
        raise JobError("max-workers must be between 1 and 2147483647")
    if tuning.max_chunk < 0:
        raise JobError("max-chunk must be zero (which means no limit) or positive")
    if tuning.min_cluster_size & (tuning.min_cluster_size - 1):
        raise JobError("min-cluster-size needs to be a power of 2")
    if options.compress:
        raise JobError(f"Compression is not supported for this drive {target.name}")
    if source.is_filter:
        raise JobError(
            f"Node '{source.name}' is a job's filter and cannot be backed up itself: name the node below it"
        )
