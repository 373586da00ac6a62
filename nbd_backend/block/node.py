"""A node of the block graph, as Python keeps it beside the kernel's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nbd_backend.block import kernel
from nbd_backend.block.locks import FileLock
from nbd_backend.block.permissions import Permission

Identity = tuple[int, int]
"""Device and inode: what tells that two names are one file."""


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """What a format's header says about an image; sizes in bytes. `specific` is QMP's ImageInfoSpecific."""

    cluster_size: int | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_format: str | None = None
    dirty: bool | None = None
    specific: dict[str, Any] | None = None


@dataclass(eq=False, repr=False, slots=True)
class BlockNode:
    """One named node. Changed by the graph only, on the loop; its immutable fields may be read from any
    thread.

    `children` are by role ("file", "backing"), `parents` the nodes that have it as a child. `owned` says that
    blockdev-add made it (and blockdev-del may remove it); other nodes go with their last parent.
    `loss_told` says that its user knows that what was written to it may be lost (`Graph.tell_loss`).
    """

    name: str
    driver: str
    handle: kernel.Node
    id: int
    options: dict[str, Any]
    read_only: bool
    filename: str
    info: FormatInfo
    cache_direct: bool = False
    cache_no_flush: bool = False
    identity: Identity | None = None
    lock: FileLock | None = None
    is_filter: bool = False
    children: dict[str, BlockNode] = field(default_factory=dict)
    claims: dict[str, Permission] = field(default_factory=dict)
    parents: list[BlockNode] = field(default_factory=list)
    owned: bool = False
    filter_above: BlockNode | None = None
    retired: bool = False
    loss_told: bool = False

    def __repr__(self) -> str:
        return f"<BlockNode {self.name}: {self.driver} {self.filename}>"

    @property
    def size(self) -> int:
        """Bytes of the disk it shows."""
        return self.handle.size

    @property
    def file(self) -> BlockNode | None:
        """The node that holds its bytes, or the node that a filter passes to."""
        return self.children.get("file")

    @property
    def backing(self) -> BlockNode | None:
        """The layer below it."""
        return self.children.get("backing")

    @property
    def in_place(self) -> bool:
        """Whether it is a filter that a job has put above a node, and requests go through it."""
        return self.file is not None and self.file.filter_above is self

    @property
    def entry(self) -> BlockNode:
        """Where its users' requests enter: the topmost filter that a job put above it, or itself."""
        node = self
        while node.filter_above is not None:
            node = node.filter_above
        return node

    def chain(self) -> list[BlockNode]:
        """The layers from this one down to the base, filters left out."""
        layers: list[BlockNode] = []
        node: BlockNode | None = self
        while node is not None:
            if not node.is_filter:
                layers.append(node)
            node = node.file if node.is_filter else node.backing
        return layers

    @property
    def depth(self) -> int:
        """Number of layers below it."""
        return len(self.chain()) - 1
