"""What a command handler may use. Made once, by the composition root; each handler's first parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jobs.block.legacy import BlockJobNames
    from jobs.manager import JobManager
    from nbd_backend.block.exports import Exports
    from nbd_backend.block.graph import Graph
    from nbd_backend.control.events import EventBus
    from nbd_backend.control.registry import Registry

__all__ = ["Context", "ListenerControl"]


class ListenerControl(Protocol):
    """The NBD server's listening sockets. Loop thread only."""

    @property
    def addresses(self) -> list[str]:
        """Where NBD clients can connect now: ``unix:PATH`` or ``tcp:HOST:PORT``, oldest first."""

    async def start(self, address: str) -> None:
        """Listen on ``unix:PATH`` or ``tcp:HOST:PORT``. Raises AddressError, which names the address."""

    async def stop(self) -> None:
        """Stop listening everywhere; clients stay. Raises AddressError when nothing listens."""

    def disconnect(self) -> None:
        """Let the connections of all clients end, once what is in flight has been answered."""


@dataclass(slots=True)
class Context:
    """The parts of the server, by what they are for."""

    registry: Registry  #: the commands and events that exist
    events: EventBus  #: to tell every monitor what happened
    graph: Graph  #: block nodes
    exports: Exports  #: what NBD clients can see
    jobs: JobManager
    block_jobs: BlockJobNames
    nbd: ListenerControl
    scratch_dir: str  #: where jobs put files that nobody else sees
    quit: Callable[[], None]  #: asks the server to stop in good order; returns at once
