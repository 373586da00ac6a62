"""A QMP server in the test's process: its context with stubs, and clients that speak bytes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from nbd_backend.control.commands import block_events, general, job_events
from nbd_backend.control.context import Context
from nbd_backend.control.events import EventBus
from nbd_backend.control.registry import Registry
from nbd_backend.control.server import QMPServer

Message = dict[str, Any]


class Unused:
    """Stands for a part of the context that the test must not touch."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"the test did not expect a use of '{name}'")


def registry_of(**definitions: object) -> Registry:
    """The general commands, the events of jobs and blocks, and the given definitions: all without kernel."""
    module = ModuleType("definitions")
    vars(module).update(definitions)
    return Registry([general, job_events, block_events, module])


def make_context(registry: Registry | None = None, **parts: object) -> Context:
    """A context of stubs, but for the given ``parts``; ``quit`` fails unless given."""
    chosen = registry or registry_of()

    def unexpected_quit() -> None:
        raise AssertionError("the test did not expect quit")

    chosen_parts: dict[str, Any] = {field.name: Unused() for field in dataclasses.fields(Context)}
    chosen_parts |= {
        "registry": chosen,
        "events": EventBus(chosen.events, check=True),
        "quit": unexpected_quit,
    }
    return Context(**(chosen_parts | parts))


@dataclass
class Served:
    """A running server and what it works on."""

    server: QMPServer
    context: Context


@asynccontextmanager
async def serving(path: Path, registry: Registry | None = None, **parts: object) -> AsyncIterator[Served]:
    """A server on ``path`` while the block runs."""
    context = make_context(registry, **parts)
    server = QMPServer(context)
    await server.listen(str(path))
    try:
        yield Served(server, context)
    finally:
        context.events.close()
        await server.close()


@dataclass
class RawClient:
    """A client that sends any bytes and reads lines; every line must be one JSON object that ends in CRLF."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    greeting: Message = field(default_factory=dict)

    @classmethod
    async def connect(
        cls, path: Path, *, enable: list[str] | None = None, negotiate: bool = True
    ) -> RawClient:
        """Connect, read the greeting, and negotiate unless told otherwise."""
        client = cls(*await asyncio.open_unix_connection(str(path), limit=1 << 22))
        client.greeting = await client.receive()
        if negotiate:
            arguments = {"enable": enable} if enable is not None else {}
            assert await client.execute("qmp_capabilities", **arguments) == {"return": {}}
        return client

    def send(self, *messages: Message | bytes) -> None:
        """Send messages, or bytes as they are."""
        for message in messages:
            self.writer.write(message if isinstance(message, bytes) else json.dumps(message).encode())

    async def receive(self) -> Message:
        """The next message. Raises EOFError at the end."""
        line = await asyncio.wait_for(self.reader.readline(), 20)
        if not line:
            raise EOFError
        assert line.endswith(b"\r\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def execute(self, name: str, **arguments: object) -> Message:
        """Send a command and return the next message."""
        self.send({"execute": name, "arguments": arguments})
        return await self.receive()

    async def close(self) -> None:
        """Disconnect."""
        self.writer.close()
        await self.writer.wait_closed()
