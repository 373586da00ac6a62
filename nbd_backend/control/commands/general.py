"""Commands about the server itself: negotiation, introspection, version, quit."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from nbd_backend.control.arguments import Arguments
from nbd_backend.control.context import Context
from nbd_backend.control.errors import CommandNotFound
from nbd_backend.control.registry import command
from nbd_backend.control.version import VERSION, VersionInfo

__all__ = ["CommandInfo", "Negotiation"]


class Negotiation(Arguments, frozen=True):
    """The capabilities that the client wants, of those that the greeting offers."""

    enable: tuple[Literal["oob"], ...] = ()


class CommandInfo(msgspec.Struct, frozen=True):
    """A command that the server knows."""

    name: str


@command("qmp_capabilities", arguments=Negotiation, since="0.13")
async def qmp_capabilities(context: Context, arguments: Negotiation) -> None:
    """Begin the session. A session handles this itself while it negotiates: here it is always too late."""
    raise CommandNotFound("Capabilities negotiation is already complete, command ignored")


@command("query-version", returns=VersionInfo, since="0.14")
async def query_version(context: Context, arguments: None) -> VersionInfo:
    """The release whose interface the server follows, and its own."""
    return VERSION


@command("query-commands", returns=list[CommandInfo], since="0.14")
async def query_commands(context: Context, arguments: None) -> list[CommandInfo]:
    """The names of all commands."""
    return [CommandInfo(name) for name in context.registry.commands]


@command("query-qmp-schema", returns=list[dict[str, Any]], since="2.5")
async def query_qmp_schema(context: Context, arguments: None) -> msgspec.Raw:
    """Every command and event with the types of its arguments and results."""
    from nbd_backend.control.schema import encoded_schema  # few clients ask, so few servers load it

    return encoded_schema(context.registry)


@command("quit", since="0.14")
async def quit_server(context: Context, arguments: None) -> None:
    """Stop the server in good order. The reply is sent first."""
    context.quit()
