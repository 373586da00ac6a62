"""The block graph: named nodes, who uses them, and every change of its shape. Loop only.

A node is made by `add` (blockdev-add), with its children, or not at all. It lives until `remove` when the
monitor owns it, else until its last parent is gone. Jobs put filters above a node with `insert_filter`; the
node keeps its name and its permissions, and its users (exports, overlays) enter through the topmost filter
instead.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from nbd_backend.block import kernel
from nbd_backend.block.building import Build
from nbd_backend.block.describe import describe_node
from nbd_backend.block.driver import Inherited
from nbd_backend.block.drivers import discover
from nbd_backend.block.errors import BlockError, KernelError, Kind
from nbd_backend.block.events import EventRing
from nbd_backend.block.gate import Drain
from nbd_backend.block.node import BlockNode, FormatInfo, Identity
from nbd_backend.block.permissions import Permissions
from nbd_backend.block.security import PathPolicy

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")
_MAX_NAME = 31
log = logging.getLogger(__name__)


_REMOVE_AGAIN = (
    "what was written to it last may be lost; once more, blockdev-del removes it even if that fails again"
)


class Root:
    """An export's place in the graph: the node its user named; requests enter at ``node.entry``."""

    __slots__ = ("export", "node")

    def __init__(self, export: kernel.Export, node: BlockNode) -> None:
        self.export = export
        self.node = node


class BackgroundUse:
    """Requests to a node that no export sees: those of a job. `quiesced()`: none is in flight inside."""

    __slots__ = ("node", "quiesced")

    def __init__(self, node: BlockNode, quiesced: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self.node = node
        self.quiesced = quiesced


class Graph:
    """All nodes of this server."""

    def __init__(self, ring: EventRing, policy: PathPolicy | None = None) -> None:
        self.ring = ring
        self.policy = policy or PathPolicy()
        self.drivers = discover()
        self.permissions = Permissions()
        self._nodes: dict[str, BlockNode] = {}
        self._reserved: set[str] = set()
        self._closing: list[BlockNode] = []  # out of the graph, but their files are still open
        self._roots: list[Root] = []
        self._background: list[BackgroundUse] = []
        self._ids = itertools.count(1)
        self._auto_names = itertools.count(100)

    # ---- looking things up ----

    def find(self, name: str) -> BlockNode | None:
        """The node of that name."""
        return self._nodes.get(name)

    def get(self, name: str) -> BlockNode:
        """The node of that name; raises BlockError (Kind.NOT_FOUND)."""
        node = self._nodes.get(name)
        if node is None:
            raise BlockError(
                Kind.NOT_FOUND,
                f"Cannot find device='{name}' nor node-name='{name}'",
                hint="query-named-block-nodes lists the nodes",
            )
        return node

    def by_id(self, node_id: int) -> BlockNode | None:
        """The node that kernel events and extents name by this number."""
        return next((node for node in self._nodes.values() if node.id == node_id), None)

    def nodes(self) -> list[BlockNode]:
        """Every node, newest first."""
        return list(reversed(self._nodes.values()))

    def nodes_of_file(self, identity: Identity) -> list[BlockNode]:
        """The nodes that have the file of this device and inode open."""
        return [node for node in [*self._nodes.values(), *self._closing] if node.identity == identity]

    def describe(self, node: BlockNode, *, flat: bool = False) -> dict[str, Any]:
        """BlockDeviceInfo of `node`, as in query-named-block-nodes; `flat`: without the images below."""
        return describe_node(node, flat=flat)

    # ---- adding and removing ----

    async def add(self, options: Mapping[str, Any]) -> BlockNode:
        """Open a node and its children from blockdev-add's options; all or nothing."""
        if not options.get("node-name"):
            raise BlockError(Kind.INVALID, "'node-name' must be specified for the root node")
        return await self.add_unnamed(options)

    async def add_unnamed(self, options: Mapping[str, Any]) -> BlockNode:
        """Like `add`, for the server's own use: without node-name one is made up."""
        build = Build(self)
        try:
            node = await build.open(options, Inherited())
        except BaseException:
            await build.abort()
            raise
        node.owned = True
        return node

    async def remove(self, name: str) -> None:
        """Flush and close a node that blockdev-add made and nobody uses, with the children that only it uses.

        Raises BlockError when it is in use, and KernelError when the flush fails; the node stays then. That
        is told once: when the flush fails again, it is logged and the node removed, else a node whose server
        or disk is gone could never be.
        """
        node = self._removable(name)
        if not node.read_only:
            if failed := await self._flush_or_tell(node, hint=_REMOVE_AGAIN):
                raise failed
            node = self._removable(name)  # somebody may have come while it flushed
        node.owned = False
        await self.drop(node)

    async def _flush_or_tell(self, node: BlockNode, *, hint: str = "") -> KernelError | None:
        """Flush; the failure that the user is to be told of, which he counts as told from now on."""
        try:
            await self.ring.run(node.handle.start_flush, f"Could not flush node '{node.name}'")
        except KernelError as error:
            if not node.loss_told:
                self.tell_loss(node)
                return KernelError(f"Could not flush node '{node.name}'", error.errno, hint=hint)
            log.warning("%s; the node is removed without", error)
        return None

    def tell_loss(self, node: BlockNode) -> None:
        """Take note that a user was told that what was written to `node` may be lost: its flush may fail now
        without another error. Holds until somebody wants to write to it again.
        """
        node.loss_told = True
        if node.file is not None and node.file.parents == [node]:
            self.tell_loss(node.file)

    def cut_off(self, node: BlockNode) -> bool:
        """Give up the NBD server below `node`, if there is one, for good: whoever waits for it gets an error.

        Nothing happens, and False is returned, when a guest can reach that server.
        """
        bottom = node
        while bottom.file is not None:
            bottom = bottom.file
        if bottom.driver != "nbd" or self.exports_above([bottom]):
            return False
        bottom.handle.abort_nbd()
        return True

    def cut_off_all(self) -> None:
        """Give up all NBD servers, when the end cannot wait for them any longer."""
        for node in [*self._nodes.values(), *self._closing]:
            if node.driver == "nbd":
                log.error("node '%s': server '%s' is given up", node.name, node.filename)
                node.handle.abort_nbd()

    def _removable(self, name: str) -> BlockNode:
        node = self._nodes.get(name)
        if node is None:
            raise BlockError(Kind.NOT_FOUND, f"Failed to find node with node-name='{name}'")
        users = [holder for holder in self.permissions.holders(node) if holder.kind != "node"]
        if users:
            who = "; ".join(f"{holder}: {holder.way_out}" for holder in users)
            raise BlockError(Kind.IN_USE, f"Node {node.name} is in use", hint=who)
        if not node.owned:
            raise BlockError(Kind.IN_USE, f"Node {node.name} is not owned by the monitor")
        if node.parents:
            parents = ", ".join(f"'{parent.name}'" for parent in node.parents)
            raise BlockError(
                Kind.IN_USE, f"Block device {node.name} is in use", hint=f"by {parents}: remove that first"
            )
        return node

    async def drop(self, node: BlockNode) -> None:
        """Close `node` unless somebody still needs it, then its children likewise. Waits until the files are
        closed.
        """
        gone: list[BlockNode] = []
        candidates = [node]
        while candidates:
            candidate = candidates.pop()
            if self._nodes.get(candidate.name) is not candidate or self._needed(candidate):
                continue
            candidates += self._detach(candidate)
            self._nodes.pop(candidate.name, None)
            gone.append(candidate)
        self._closing += gone
        await asyncio.shield(self._close_all(gone))

    def _needed(self, node: BlockNode) -> bool:
        used = bool(self.permissions.holders(node)) and not node.retired
        return node.owned or bool(node.parents) or used or node.in_place

    async def _close_all(self, nodes: list[BlockNode]) -> None:
        for node in nodes:
            await self.ring.run(node.handle.start_close, f"Could not close node '{node.name}'")
            if node.lock is not None:
                node.lock.close()
            self._closing.remove(node)

    def _detach(self, node: BlockNode) -> list[BlockNode]:
        """Cut `node` off its children, which are returned."""
        children = list(node.children.values())
        for claim in node.claims.values():
            claim.release()
        for child in children:
            child.parents.remove(node)
        node.children.clear()
        node.claims.clear()
        return children

    async def close(self) -> None:
        """Flush and close everything; exports and jobs must be gone. The first flush that fails, of a node
        whose user was not told yet, is raised at the end.
        """
        failed: KernelError | None = None
        for node in self.nodes():
            if node.owned and not node.read_only:
                error = await self._flush_or_tell(node)
                failed = failed or error
        for node in self.nodes():
            node.owned = False
        for node in self.nodes():
            await self.drop(node)
        if failed:
            raise failed

    def admit_new_file(self, path: str) -> str:
        """The name to create an image by: the path policy allows it and no node has the file open."""
        path = self.policy.admit(path)
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            return path
        except OSError as error:
            raise KernelError(f"Could not create '{path}'", error.errno or 0) from None
        for node in self.nodes_of_file((status.st_dev, status.st_ino)):
            raise BlockError(Kind.IN_USE, f"Could not create '{path}': it is open as node '{node.name}'")
        return path

    # ---- names ----

    def reserve_name(self, name: str | None) -> str:
        """Check a name for a new node, or make one up; it is taken until `register` or `release_name`."""
        if name is None:
            name = f"#block{next(self._auto_names):03}"
        elif not _NAME.fullmatch(name):
            raise BlockError(Kind.INVALID, f"Invalid node-name: '{name}'")
        elif len(name) > _MAX_NAME:
            raise BlockError(Kind.INVALID, "Node name too long", hint=f"at most {_MAX_NAME} characters")
        if name in self._nodes or name in self._reserved:
            raise BlockError(Kind.IN_USE, f"Duplicate nodes with node-name='{name}'")
        self._reserved.add(name)
        return name

    def release_name(self, name: str) -> None:
        """Undo `reserve_name`."""
        self._reserved.discard(name)

    def register(self, node: BlockNode) -> None:
        """Make a node whose name is reserved part of the graph."""
        node.handle.set_id(node.id)
        self._reserved.discard(node.name)
        self._nodes[node.name] = node
        for child in node.children.values():
            child.parents.append(node)

    def new_id(self) -> int:
        """A number for kernel events to name a node by."""
        return next(self._ids)

    # ---- exports and drain ----

    def attach(self, export: kernel.Export, node: BlockNode) -> Root:
        """Say that `export` serves `node` (its root in the kernel is ``node.entry``)."""
        root = Root(export, node)
        self._roots.append(root)
        return root

    def detach(self, root: Root) -> None:
        """Undo `attach`."""
        self._roots.remove(root)

    def exports_above(self, nodes: Iterable[BlockNode]) -> list[kernel.Export]:
        """The exports whose guests' requests can reach one of `nodes`."""
        above = _with_parents(nodes)
        return [root.export for root in self._roots if root.node.entry.name in above]

    def use_in_background(
        self, node: BlockNode, quiesced: Callable[[], AbstractAsyncContextManager[None]]
    ) -> Callable[[], None]:
        """Say that a job reads or writes `node`, until the function returned is called. `drained` enters
        `quiesced()` while something below `node` is changed.
        """
        use = BackgroundUse(node, quiesced)
        self._background.append(use)
        return lambda: self._background.remove(use)

    def _background_above(self, nodes: Iterable[BlockNode]) -> list[BackgroundUse]:
        """The jobs whose requests go through a parent of one of `nodes`; a job holds its own nodes itself."""
        above = _with_parents(parent for node in nodes for parent in node.parents)
        return [use for use in self._background if use.node.name in above]

    @asynccontextmanager
    async def drained(self, *nodes: BlockNode) -> AsyncIterator[None]:
        """No guest request is in flight in or above `nodes` while the body runs, and no job's above them.
        Nests; keep it short.

        Jobs are waited for first: they may take long, and guests must not wait for them.
        """
        still: set[BackgroundUse] = set()
        async with AsyncExitStack() as stack:
            await self._quiesce(nodes, still, stack)
            await stack.enter_async_context(Drain(self.ring, lambda: self.exports_above(nodes)))
            await self._quiesce(nodes, still, stack)  # who came while the gates closed
            yield

    async def _quiesce(
        self, nodes: Iterable[BlockNode], still: set[BackgroundUse], stack: AsyncExitStack
    ) -> None:
        """Hold every job above `nodes` that is not among `still`, until `stack` is left."""
        while missing := [use for use in self._background_above(nodes) if use not in still]:
            still.add(missing[0])
            await stack.enter_async_context(missing[0].quiesced())

    # ---- filters ----

    async def insert_filter(
        self, below: BlockNode, make: Callable[[kernel.Node], kernel.Node], name: str | None = None
    ) -> BlockNode:
        """Put a filter above `below` and above the filters that are there already; its users go through it
        from now on.

        `make` gets the kernel node to sit on and returns the filter; it is called while everything above is
        drained, and must not block. When it raises, nothing has changed.
        """
        self._refuse_fixed_parents(below)
        name = self.reserve_name(name)
        try:
            async with self.drained(below):
                top = below.entry
                handle = make(top.handle)
                node = self._filter_node(name, top, handle)
                self.register(node)
                self._repoint(top, node)
                top.filter_above = node
        finally:
            self.release_name(name)
        return node

    async def remove_filter(self, node: BlockNode) -> None:
        """Take a filter away. Below another filter it stays, inactive, until that one goes: the caller has
        released whatever it did to requests.
        """
        node.retired = True
        gone: list[BlockNode] = []
        async with self.drained(node):
            top = node.entry  # not sooner: filters may come and go while the guests are drained
            while top.retired and top.in_place:
                below = top.children["file"]
                self._repoint(top, below)
                below.filter_above = None
                for root in self._roots:
                    root.node = below if root.node is top else root.node
                gone.append(top)
                top = below
        for each in gone:
            await self.drop(each)

    def _refuse_fixed_parents(self, below: BlockNode) -> None:
        """A 'file' child is fixed in the kernel: writes of such a parent would go past the filter."""
        filters = set[int]()
        above = below.filter_above
        while above is not None:
            filters.add(above.id)
            above = above.filter_above
        for parent in below.parents:
            if parent.file is below and not parent.read_only and parent.id not in filters:
                raise BlockError(
                    Kind.IN_USE,
                    f"Node '{below.name}' is the 'file' child of node '{parent.name}', which may write to it",
                    hint=f"use node '{parent.name}' instead",
                )

    def _filter_node(self, name: str, below: BlockNode, handle: kernel.Node) -> BlockNode:
        return BlockNode(
            name=name,
            driver=handle.driver,
            handle=handle,
            id=self.new_id(),
            options={"driver": handle.driver, "file": below.name},
            read_only=below.read_only,
            filename=below.filename,
            info=FormatInfo(cluster_size=below.info.cluster_size),
            cache_direct=below.cache_direct,
            cache_no_flush=below.cache_no_flush,
            is_filter=True,
            children={"file": below},
        )

    def _repoint(self, old: BlockNode, new: BlockNode) -> None:
        """Let the exports that enter at `old`, and its overlays, enter at `new`. All above is drained."""
        for root in self._roots:
            if root.node.entry is old:
                root.export.set_root(new.handle)
        for parent in [parent for parent in old.parents if parent is not new and parent.backing is old]:
            parent.handle.set_backing(new.handle)
            parent.children["backing"] = new
            old.parents.remove(parent)
            new.parents.append(parent)


def _with_parents(nodes: Iterable[BlockNode]) -> set[str]:
    """The names of `nodes` and of everything above them."""
    above: set[str] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.name not in above:
            above.add(node.name)
            pending += node.parents
    return above
