"""Commands about where NBD clients connect."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nbd_backend.control.arguments import Arguments, Uint32
from nbd_backend.control.context import Context
from nbd_backend.control.errors import GenericError, QMPError, to_qmp_error
from nbd_backend.control.registry import command
from nbd_backend.sockets import AddressError

__all__ = ["InetAddress", "InetSocket", "ServerStart", "UnixAddress", "UnixSocket"]


@to_qmp_error.register
def _(failure: AddressError) -> QMPError:
    return GenericError(str(failure))


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    pass


class UnixSocket(_Strict, frozen=True):
    """A unix socket, made with permissions for its owner only."""

    path: str


class InetSocket(_Strict, frozen=True):
    """A TCP socket."""

    host: str
    port: str


class UnixAddress(_Strict, frozen=True, tag_field="type", tag="unix"):
    """A unix socket."""

    data: UnixSocket


class InetAddress(_Strict, frozen=True, tag_field="type", tag="inet"):
    """A TCP socket."""

    data: InetSocket


SocketAddress = Annotated[UnixAddress | InetAddress, msgspec.Meta(title="SocketAddressLegacy")]


class ServerStart(Arguments, frozen=True):
    """Where to listen. Limits on connections and on the time of a handshake are not to be had: 0."""

    addr: SocketAddress
    max_connections: Uint32 = 0
    handshake_max_seconds: Uint32 = 0


@command("nbd-server-start", arguments=ServerStart, since="1.3")
async def nbd_server_start(context: Context, arguments: ServerStart) -> None:
    """Listen on a further address; refused when the server listens there already."""
    if arguments.max_connections:
        raise GenericError("Parameter 'max-connections' is not supported: leave it out, or give 0 (no limit)")
    if arguments.handshake_max_seconds:
        raise GenericError(
            "Parameter 'handshake-max-seconds' is not supported: leave it out, or give 0 (no limit)"
        )
    await context.nbd.start(_address(arguments.addr))


def _address(address: UnixAddress | InetAddress) -> str:
    if isinstance(address, UnixAddress):
        return f"unix:{address.data.path}"
    host = f"[{address.data.host}]" if ":" in address.data.host else address.data.host
    return f"tcp:{host}:{address.data.port}"


@command("nbd-server-stop", since="1.3")
async def nbd_server_stop(context: Context, arguments: None) -> None:
    """Stop listening everywhere, disconnect all clients, and remove all exports."""
    await context.nbd.stop()
    await context.exports.close()
    context.nbd.disconnect()
