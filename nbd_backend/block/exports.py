"""Exports: disks that NBD clients see. Changed on the loop; `snapshot` may be read from any thread."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from nbd_backend.block import kernel
from nbd_backend.block.errors import BlockError, KernelError, Kind
from nbd_backend.block.gate import Drain
from nbd_backend.block.graph import Graph, Root
from nbd_backend.block.kernel import NodeFlag
from nbd_backend.block.node import BlockNode
from nbd_backend.block.permissions import READ, READ_WRITE, UNCHANGED, Access, Holder, HolderKind, Permission

_ID = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")
_MAX_NAME = 4096  # bytes; the NBD protocol's limit on strings

RemoveMode = Literal["safe", "hard"]


@dataclass(eq=False, slots=True)
class ExportEntry:
    """One export. All but `shutting_down` is immutable; any thread may read it."""

    id: str
    name: str
    description: str
    node_name: str
    writable: bool
    export: kernel.Export
    root: Root
    permission: Permission
    shutting_down: bool = False


class Exports:
    """All exports, by id and by NBD name; the first that was added and is still there is the default.

    `on_deleted` is called with the id once an export is gone (BLOCK_EXPORT_DELETED).
    """

    def __init__(self, graph: Graph, on_deleted: Callable[[str], None] = lambda _: None) -> None:
        self._graph = graph
        self._by_id: dict[str, ExportEntry] = {}
        self.on_deleted = on_deleted
        self.snapshot: Mapping[str, ExportEntry] = MappingProxyType({})
        """Exports by NBD name in the order they were added; replaced as a whole, never changed. Any thread.
        """

    def find(self, name: str) -> ExportEntry | None:
        """The export of that NBD name; an empty name means the default one. Any thread."""
        snapshot = self.snapshot
        return snapshot.get(name) or (next(iter(snapshot.values()), None) if name == "" else None)

    @property
    def default(self) -> ExportEntry | None:
        """The export that a client gets who names none. Any thread."""
        return next(iter(self.snapshot.values()), None)

    def listing(self) -> list[dict[str, Any]]:
        """The data of query-block-exports."""
        return [
            {
                "id": entry.id,
                "type": "nbd",
                "node-name": entry.node_name,
                "shutting-down": entry.shutting_down,
            }
            for entry in self._by_id.values()
        ]

    def entries(self) -> list[ExportEntry]:
        """Every export in the order they were added, those that shut down included."""
        return list(self._by_id.values())

    def add(
        self,
        export_id: str,
        name: str | None,
        node: BlockNode,
        *,
        writable: bool = False,
        description: str = "",
    ) -> ExportEntry:
        """Serve `node` under the NBD name `name` (None: the node's name). Loop."""
        name = node.name if name is None else name
        self._check_new(export_id, name)
        if writable and node.read_only:
            raise BlockError(
                Kind.INVALID,
                "Cannot export read-only node as writable",
                hint=f"export '{export_id}' of node '{node.name}': leave writable out",
            )
        shares = UNCHANGED | {Access.WRITE}
        uses = READ_WRITE if writable else READ
        permission = self._graph.permissions.acquire(
            node, Holder(HolderKind.EXPORT, export_id), uses=uses, shares=shares
        )
        try:
            export = kernel.Export.new(name, node.entry.handle, writable)
        except KernelError:
            permission.release()
            raise
        root = self._graph.attach(export, node)
        entry = ExportEntry(export_id, name, description, node.name, writable, export, root, permission)
        self._by_id[export_id] = entry
        self._publish()
        return entry

    def _check_new(self, export_id: str, name: str) -> None:
        if not _ID.fullmatch(export_id):
            raise BlockError(
                Kind.INVALID,
                "Invalid block export id",
                hint=f"'{export_id}': a letter, then letters, digits, - . _",
            )
        if export_id in self._by_id:
            raise BlockError(Kind.IN_USE, f"Block export id '{export_id}' is already in use")
        if len(name.encode()) > _MAX_NAME:
            raise BlockError(
                Kind.INVALID, f"export name '{name}' too long", hint=f"at most {_MAX_NAME} bytes"
            )
        if name in self.snapshot:
            raise BlockError(Kind.IN_USE, f"NBD server already has export named '{name}'")

    async def remove(self, export_id: str, mode: RemoveMode = "safe") -> None:
        """Stop serving an export; `hard` disconnects its clients, `safe` refuses while there are any.

        Returns when no request uses the node any more and `on_deleted` was called.
        """
        entry = self._by_id.get(export_id)
        if entry is None:
            raise BlockError(Kind.NOT_FOUND, f"Export '{export_id}' is not found")
        if entry.shutting_down:
            raise BlockError(Kind.IN_USE, f"Export '{export_id}' is already shutting down")
        if mode == "safe" and entry.export.clients:
            raise BlockError(
                Kind.IN_USE,
                f"export '{export_id}' still in use",
                hint="Use mode='hard' to force client disconnect",
            )
        entry.shutting_down = True
        entry.export.unregister()
        self._publish()
        entry.export.kill()
        await self._let_go(entry)
        del self._by_id[export_id]
        self.on_deleted(export_id)

    async def _let_go(self, entry: ExportEntry) -> None:
        """Clients may hold a killed export until they notice; it must not hold the image that long."""
        async with Drain(self._graph.ring, lambda: [entry.export]):
            entry.export.set_root(kernel.null_open(0, 0, True, NodeFlag.READ_ONLY))
            self._graph.detach(entry.root)
        entry.export.close()
        entry.permission.release()

    async def close(self) -> None:
        """Remove every export, disconnecting clients."""
        for export_id in [key for key, entry in self._by_id.items() if not entry.shutting_down]:
            await self.remove(export_id, "hard")

    def _publish(self) -> None:
        self.snapshot = MappingProxyType(
            {entry.name: entry for entry in self._by_id.values() if not entry.shutting_down}
        )
