"""Op blockers: who uses a node in which way, and what each of them lets others do.

A holder *uses* some kinds of access and *shares* some: every use of one must be shared by all others. There
is no other blocker; a refusal names both parties, since when the one in possession is there, and how it can
be ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from nbd_backend.block.errors import BlockError, Kind

if TYPE_CHECKING:
    from nbd_backend.block.node import BlockNode


class Access(Enum):
    """A kind of access to a node's data."""

    CONSISTENT_READ = "consistent read"  # what is read makes sense as a disk
    WRITE = "write"
    WRITE_UNCHANGED = "write unchanged"  # writes that do not change what is read, such as a copy on read
    RESIZE = "resize"


ALL = frozenset(Access)
READ = frozenset({Access.CONSISTENT_READ})
READ_WRITE = READ | {Access.WRITE}
UNCHANGED = READ | {Access.WRITE_UNCHANGED}


class HolderKind(StrEnum):
    """Who can hold a permission."""

    EXPORT = "export"
    JOB = "job"
    NODE = "node"  # a parent in the graph


_WAY_OUT = {
    HolderKind.EXPORT: "remove it with block-export-del",
    HolderKind.JOB: "end it with job-cancel",
    HolderKind.NODE: "remove it with blockdev-del",
}


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Holder:
    """A party: `id` as the user knows it, `detail` what it does there ("backup", "as 'file' child")."""

    kind: HolderKind
    id: str
    detail: str = ""
    since: datetime = field(default_factory=_now)

    def __str__(self) -> str:
        return f"{self.kind} '{self.id}'" + (f" ({self.detail})" if self.detail else "")

    @property
    def way_out(self) -> str:
        """How a user ends it."""
        return _WAY_OUT[self.kind]


class Permission:
    """One holder's claim on one node, until `release`."""

    __slots__ = ("_forget", "holder", "shares", "uses")

    def __init__(
        self,
        holder: Holder,
        uses: frozenset[Access],
        shares: frozenset[Access],
        forget: Callable[[Permission], None],
    ) -> None:
        self.holder = holder
        self.uses = uses
        self.shares = shares
        self._forget = forget

    def release(self) -> None:
        """Give the claim up; a second call does nothing. Loop."""
        self._forget(self)


class Permissions:
    """The claims on all nodes of one graph. Loop."""

    def __init__(self) -> None:
        self._claims: dict[str, list[Permission]] = {}

    def acquire(
        self, node: BlockNode, holder: Holder, *, uses: frozenset[Access], shares: frozenset[Access]
    ) -> Permission:
        """Claim `node`, or raise a BlockError that names the conflict and the way out of it."""
        if Access.WRITE in uses and node.read_only:
            raise BlockError(
                Kind.INVALID,
                f"Block node is read-only: {holder} cannot write to node '{node.name}'",
                hint="add the node with read-only=false",
            )
        for claim in self._claims.get(node.name, ()):
            _refuse_conflict(node, holder, uses - claim.shares, claim, required_by_holder=True)
            _refuse_conflict(node, holder, claim.uses - shares, claim, required_by_holder=False)
        if Access.WRITE in uses:
            node.loss_told = False  # from now on there is something new to lose
        permission = Permission(holder, uses, shares, lambda claim: self._forget(node.name, claim))
        self._claims.setdefault(node.name, []).append(permission)
        return permission

    def holders(self, node: BlockNode) -> list[Holder]:
        """Everyone who has a claim on `node`, oldest first."""
        return [claim.holder for claim in self._claims.get(node.name, ())]

    def _forget(self, name: str, permission: Permission) -> None:
        claims = self._claims.get(name, [])
        if permission in claims:
            claims.remove(permission)
        if not claims:
            self._claims.pop(name, None)


def _refuse_conflict(
    node: BlockNode,
    holder: Holder,
    refused: frozenset[Access],
    claim: Permission,
    *,
    required_by_holder: bool,
) -> None:
    if not refused:
        return
    names = ", ".join(sorted(access.value for access in refused))
    since = f"{claim.holder.since:%Y-%m-%d %H:%M:%S} UTC"
    needs, denies = (holder, claim.holder) if required_by_holder else (claim.holder, holder)
    raise BlockError(
        Kind.IN_USE,
        f"Permission conflict on node '{node.name}': permissions '{names}' are both required by {needs}"
        f" and unshared by {denies}; {claim.holder} is there since {since}:"
        f" {claim.holder.way_out}",
    )
