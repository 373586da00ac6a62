"""Another NBD server's export as a node."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import msgspec

from nbd_backend.block import kernel
from nbd_backend.block.driver import Driver, OpenContext, Opened
from nbd_backend.block.options import NodeOptions


class UnixServer(msgspec.Struct, tag_field="type", tag="unix", forbid_unknown_fields=True, frozen=True):
    """A unix socket."""

    path: str


class InetServer(msgspec.Struct, tag_field="type", tag="inet", forbid_unknown_fields=True, frozen=True):
    """A TCP address; the port as text, as QMP has it."""

    host: str
    port: str


class Options(NodeOptions, frozen=True, kw_only=True):
    """`export` is the name at the server; `connections` are used at once when the server allows several."""

    server: UnixServer | InetServer
    export: str = ""
    connections: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4


async def open_nbd(context: OpenContext, options: Options) -> Opened:
    """Connect; the path of a unix socket passes the path policy like a file."""
    if isinstance(options.server, UnixServer):
        context.policy.admit(options.server.path)
    uri = uri_of(options.server, options.export)
    handle = await context.run(kernel.nbd_open, uri, options.connections, context.flags)
    return Opened(handle, uri, context.read_only or handle.read_only)


def uri_of(server: UnixServer | InetServer, export: str) -> str:
    """The NBD URI of an export."""
    if isinstance(server, UnixServer):
        return f"nbd+unix:///{quote(export, safe='')}?socket={quote(server.path)}"
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"nbd://{host}:{server.port}/{quote(export, safe='')}"


DRIVER = Driver(names=("nbd",), options=Options, open=open_nbd)
