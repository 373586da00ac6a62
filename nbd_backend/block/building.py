"""Opening nodes: one Build turns one blockdev-add into nodes, or undoes what it had done.

Each child is opened in a task of its own, so that the length of a chain is not bounded by the stack.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from nbd_backend.block.driver import Driver, Inherited, Lineage, Opened
from nbd_backend.block.errors import BlockError, Kind
from nbd_backend.block.kernel import NodeFlag
from nbd_backend.block.node import BlockNode, Identity
from nbd_backend.block.options import NodeOptions, NodeRef, convert
from nbd_backend.block.permissions import ALL, READ, UNCHANGED, Access, Holder, HolderKind, Permission
from nbd_backend.block.threads import run_blocking

if TYPE_CHECKING:
    from nbd_backend.block.graph import Graph

P = ParamSpec("P")
T = TypeVar("T")

_WRITES = READ | {Access.WRITE, Access.RESIZE}


class Build:
    """The nodes of one `Graph.add`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: list[BlockNode] = []
        self.opening: dict[Identity, bool] = {}

    async def open(self, raw: Mapping[str, Any], inherited: Inherited) -> BlockNode:
        """Open one node with its children and register it."""
        driver = self._driver(raw, inherited.prefix)
        options = convert(raw, driver.options, inherited.prefix)
        check_detect_zeroes(options)
        name = self.graph.reserve_name(options.node_name)
        opening = Opening(self, name, options, inherited)
        try:
            opened = await driver.open(opening, options)
        except BaseException:
            await opening.abandon()
            raise
        finally:
            self.graph.release_name(name)
        node = opening.finish(driver, dict(raw), opened)
        self.graph.register(node)
        self.made.append(node)
        return node

    async def abort(self) -> None:
        """Close what was opened, newest first."""
        while self.made:
            await self.graph.drop(self.made.pop())

    def _driver(self, raw: Mapping[str, Any], prefix: str) -> Driver:
        name = raw.get("driver")
        member = f"{prefix}.driver" if prefix else "driver"
        if name is None:
            raise BlockError(Kind.INVALID, f"Parameter '{member}' is missing")
        if not isinstance(name, str):
            raise BlockError(Kind.INVALID, f"Invalid parameter type for '{member}', expected: string")
        driver = self.graph.drivers.get(name)
        if driver is None:
            raise BlockError(
                Kind.INVALID,
                f"Parameter 'driver' does not accept value '{name}'",
                hint=f"known drivers: {', '.join(sorted(self.graph.drivers))}",
            )
        return driver


def check_detect_zeroes(options: NodeOptions) -> None:
    """Refuse what is not there, with QEMU's text for what it refuses too."""
    if options.detect_zeroes == "unmap" and options.discard != "unmap":
        raise BlockError(
            Kind.INVALID,
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        )
    if options.detect_zeroes != "off":
        raise BlockError(
            Kind.UNSUPPORTED, f"detect-zeroes={options.detect_zeroes} is not supported", hint="leave it out"
        )


class Opening:
    """One node between its options and its kernel handle; the OpenContext that its driver sees."""

    def __init__(self, build: Build, name: str, options: NodeOptions, inherited: Inherited) -> None:
        self.policy = build.graph.policy
        self.lineage = inherited.lineage
        self.auto_read_only = options.auto_read_only
        self.force_share = inherited.force_share if options.force_share is None else options.force_share
        self.flags = _flags(options, inherited)
        self._build = build
        self._name = name
        self._options = options
        self._inherited = inherited
        self._children: dict[str, BlockNode] = {}
        self._claims: dict[str, Permission] = {}

    @property
    def read_only(self) -> bool:
        """Whether the node is to be opened read-only."""
        return bool(self.flags & NodeFlag.READ_ONLY)

    async def child(
        self, role: str, ref: NodeRef, *, read_only: bool | None = None, lineage: Lineage | None = None
    ) -> BlockNode:
        """The child named by `ref`, opened if need be, and claimed for this node."""
        if isinstance(ref, str):
            node = self._build.graph.get(ref)
        else:
            inherited = self._inherit(role, self.read_only if read_only is None else read_only, lineage)
            node = await asyncio.create_task(self._build.open(ref, inherited))
        self._claims[role] = self._claim(role, node)
        self._children[role] = node
        return node

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what blocks off the loop."""
        return await run_blocking(function, *args, **kwargs)

    def claim_file(self, path: str, identity: Identity) -> None:
        """Refuse a file that is above in the same chain, or that a second writer would share."""
        link = self.lineage
        while link is not None:
            if link.identity == identity:
                raise BlockError(
                    Kind.BAD_IMAGE,
                    f"Could not open '{path}': it is in its own backing chain (a loop)",
                    hint="look at the chain: qemu-img info FILE for each of its files",
                )
            link = link.above
        if self.force_share and self.read_only:
            return
        for node in self._build.graph.nodes_of_file(identity):
            if not (self.read_only and node.read_only):
                raise BlockError(
                    Kind.IN_USE,
                    f"Failed to get \"write\" lock: '{path}' is already open as node '{node.name}'"
                    f" ({'read-only' if node.read_only else 'read-write'})",
                    hint=f"use node '{node.name}', or add this one with read-only=true over a read-only one",
                )

    def finish(self, driver: Driver, raw: dict[str, Any], opened: Opened) -> BlockNode:
        """The node as the graph keeps it."""
        return BlockNode(
            name=self._name,
            driver=self._options.driver,
            handle=opened.handle,
            id=self._build.graph.new_id(),
            options=raw,
            read_only=opened.read_only,
            filename=opened.filename,
            info=opened.info,
            cache_direct=bool(self.flags & NodeFlag.DIRECT),
            cache_no_flush=bool(self.flags & NodeFlag.NO_FLUSH),
            identity=opened.identity,
            lock=opened.lock,
            is_filter=driver.is_filter,
            children=self._children,
            claims=self._claims,
        )

    async def abandon(self) -> None:
        """Give up the claims on the children; those that were opened for this node go with the build."""
        for claim in self._claims.values():
            claim.release()

    def _inherit(self, role: str, read_only: bool, lineage: Lineage | None) -> Inherited:
        # Formats take care to discard only what they may, so the file below is opened with unmap.
        unmap = role == "file" or bool(self.flags & NodeFlag.UNMAP)
        return Inherited(
            read_only=read_only,
            unmap=unmap,
            direct=bool(self.flags & NodeFlag.DIRECT),
            no_flush=bool(self.flags & NodeFlag.NO_FLUSH),
            force_share=self.force_share,
            lineage=lineage or self.lineage,
            prefix=f"{self._inherited.prefix}.{role}" if self._inherited.prefix else role,
        )

    def _claim(self, role: str, node: BlockNode) -> Permission:
        writes = role == "file" and not self.read_only
        shares = ALL if self.force_share else UNCHANGED
        holder = Holder(HolderKind.NODE, self._name, f"uses node '{node.name}' as '{role}' child")
        return self._build.graph.permissions.acquire(
            node, holder, uses=_WRITES if writes else READ, shares=shares
        )


def _flags(options: NodeOptions, inherited: Inherited) -> NodeFlag:
    read_only = inherited.read_only if options.read_only is None else options.read_only
    unmap = inherited.unmap if options.discard is None else options.discard == "unmap"
    direct = inherited.direct if options.cache.direct is None else options.cache.direct
    no_flush = inherited.no_flush if options.cache.no_flush is None else options.cache.no_flush
    chosen = (
        (read_only, NodeFlag.READ_ONLY),
        (unmap, NodeFlag.UNMAP),
        (direct, NodeFlag.DIRECT),
        (no_flush, NodeFlag.NO_FLUSH),
    )
    flags = NodeFlag(0)
    for wanted, flag in chosen:
        if wanted:
            flags |= flag
    return flags
