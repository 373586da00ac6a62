"""What a block driver is to the graph: its options, and how they become a kernel node.

A driver is one module in ``nbd_backend.block.drivers`` with a module-level ``DRIVER``. No list of drivers
exists.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from nbd_backend.block import kernel
from nbd_backend.block.kernel import NodeFlag
from nbd_backend.block.locks import FileLock
from nbd_backend.block.node import BlockNode, FormatInfo, Identity
from nbd_backend.block.options import NodeOptions, NodeRef
from nbd_backend.block.security import PathPolicy

P = ParamSpec("P")
T = TypeVar("T")


class Lineage(NamedTuple):
    """The image files above a node in its chain, nearest first."""

    identity: Identity
    above: Lineage | None


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a node takes over from its parent unless its own options say otherwise."""

    read_only: bool = False
    unmap: bool = False
    direct: bool = False
    no_flush: bool = False
    force_share: bool = False
    lineage: Lineage | None = None
    prefix: str = ""


class OpenContext(Protocol):
    """What the graph offers to a driver while it opens one node."""

    policy: PathPolicy
    flags: NodeFlag
    lineage: Lineage | None
    auto_read_only: bool
    force_share: bool

    @property
    def read_only(self) -> bool:
        """Whether the node is to be opened read-only."""

    async def child(
        self, role: str, ref: NodeRef, *, read_only: bool | None = None, lineage: Lineage | None = None
    ) -> BlockNode:
        """The child named by `ref`, opened if need be, claimed for the node that is being opened."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what blocks off the loop."""

    def claim_file(self, path: str, identity: Identity) -> None:
        """Say which file is about to be opened; raises BlockError on a loop or a second writer."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What a driver made. `filename` is what queries show."""

    handle: kernel.Node
    filename: str
    read_only: bool
    info: FormatInfo = field(default_factory=FormatInfo)
    identity: Identity | None = None
    lock: FileLock | None = None


@dataclass(frozen=True, slots=True)
class Driver:
    """`names` are all driver names it answers to; `open` gets an instance of `options`."""

    names: tuple[str, ...]
    options: type[NodeOptions]
    open: Callable[[OpenContext, Any], Awaitable[Opened]]
    is_filter: bool = False


Drivers = Mapping[str, Driver]
