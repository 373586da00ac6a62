"""Commands that talk to a running server: its address, a session, errors as one line."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient

from . import CliError, _paths
from ._parser import TEXT_KEYS, scalar

T = TypeVar("T")

NO_SERVER = 3
"""Exit status when nobody answers."""


def add_address(parser: argparse.ArgumentParser) -> None:
    """Define --qmp."""
    parser.add_argument(
        "--qmp",
        metavar="unix:PATH",
        default=os.environ.get("NBD_BACKEND_QMP"),
        help="the server's QMP socket (default: $NBD_BACKEND_QMP, else qmp.sock in the runtime directory)",
    )


def address(given: str | None) -> str:
    """The socket's path from what --qmp says, with or without ``unix:``."""
    return given.removeprefix("unix:") if given else str(_paths.default_socket("qmp"))


class _Queue(EventListener):
    """Takes events; unlike its base it does not remember them for ever."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names or None)
        self.waiting: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def put(self, event: Message) -> None:
        """Take an event that just came."""
        if self.accept(event):
            await self.waiting.put(dict(event))


class Session:
    """A negotiated monitor of a server."""

    def __init__(self, client: QMPClient) -> None:
        self.client = client

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The events of these names (default: all) from now on, until the server ends."""
        queue = _Queue(names)
        self.client.register_listener(queue)
        ended = asyncio.create_task(self._put_end(queue))
        try:
            yield _until_none(queue.waiting)
        finally:
            ended.cancel()
            self.client.remove_listener(queue)

    def job_events(self) -> AbstractAsyncContextManager[AsyncIterator[dict[str, Any]]]:
        """The events that tell how jobs fare, as `events` gives them."""
        return self.events("JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")

    async def _put_end(self, queue: _Queue) -> None:
        await self.client.runstate_changed()  # from running to anything else
        await queue.waiting.put(None)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The result of a command. Raises CliError with the server's text."""
        try:
            return await self.client.execute(command, arguments)
        except ExecuteError as error:
            raise CliError(str(error)) from error
        except ExecInterruptedError as error:
            raise CliError("the server has ended") from error


async def _until_none(queue: asyncio.Queue[dict[str, Any] | None]) -> AsyncIterator[dict[str, Any]]:
    while (event := await queue.get()) is not None:
        yield event


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[Session]:
    """A session with the server at `path`. Raises CliError if there is none."""
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it would log, the caller reports
    client = QMPClient("nbd-backend")
    try:
        await client.connect(path)
    except ConnectError as error:
        reason = getattr(error.exc, "strerror", None) or str(error.exc) or type(error.exc).__name__
        raise CliError(
            f"no server answers at {path}: {reason}; start one with `nbd-backend serve`, or give --qmp",
            NO_SERVER,
        ) from error
    try:
        yield Session(client)
    finally:
        await _disconnect(client)


async def _disconnect(client: QMPClient) -> None:
    try:
        await client.disconnect()
    except (
        Exception
    ) as error:  # whatever ended the session has been reported, or is the end that was asked for
        logging.getLogger("qemu.qmp").debug("disconnect: %s", error)


def talk(arguments: argparse.Namespace, conversation: Callable[[Session], Awaitable[T]]) -> T:
    """Run `conversation` with the server that --qmp names."""

    async def run() -> T:
        async with connected(address(arguments.qmp)) as session:
            return await conversation(session)

    return asyncio.run(run())


def parse_arguments(words: list[str]) -> dict[str, Any]:
    """A command's arguments from ``key=value`` words.

    Objects, lists and quoted strings are JSON; numbers and booleans are recognised, except in names, paths
    and ports; what is left is text.
    A dot in a key leads into an object. Raises CliError (usage) for a word that is not key=value.
    """
    result: dict[str, Any] = {}
    for word in words:
        dotted, separator, raw = word.partition("=")
        if not dotted or not separator:
            raise CliError(f"'{word}' is not key=value", 2)
        *path, key = dotted.split(".")
        where = result
        for step in path:
            where = where.setdefault(step, {})
            if not isinstance(where, dict):
                raise CliError(f"'{step}' is given as a value and, by '{dotted}', as a group", 2)
        where[key] = _value(key, raw)
    return result


def _value(key: str, raw: str) -> Any:
    if raw[:1] in {"{", "[", '"'}:
        try:
            return json.loads(raw)
        except ValueError as error:
            raise CliError(f"not valid JSON: {error}: {raw}", 2) from error
    return raw if key in TEXT_KEYS else scalar(raw)
