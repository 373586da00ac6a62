"""The public client library for QMP works with the server."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from tests.support.control import serving
from tests.unit.control.test_introspection import check_schema


@asynccontextmanager
async def connected(path: Path, name: str = "client") -> AsyncIterator[QMPClient]:
    client = QMPClient(name)
    await client.connect(str(path))
    try:
        yield client
    finally:
        await client.disconnect()


def test_it_connects_negotiates_and_executes(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        async with serving(socket_path), connected(socket_path) as client:
            assert client.greeting is not None
            version = await client.execute("query-version")
            assert isinstance(version, dict)
            assert version["qemu"] == {"major": 10, "minor": 0, "micro": 0}
            assert client.greeting.QMP.version == version

    runner.run(scenario())


def test_errors_have_class_and_text(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        async with serving(socket_path), connected(socket_path) as client:
            with pytest.raises(ExecuteError) as caught:
                await client.execute("nope")
            assert caught.value.error_class == "CommandNotFound"
            assert str(caught.value) == "The command nope has not been found"
            with pytest.raises(ExecuteError, match="Parameter 'x' is unexpected"):
                await client.execute("query-version", {"x": 1})

    runner.run(scenario())


def test_commands_and_schema_can_be_asked_for(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        async with serving(socket_path) as served, connected(socket_path) as client:
            commands = await client.execute("query-commands")
            assert isinstance(commands, list)
            assert [entry["name"] for entry in commands] == list(served.context.registry.commands)
            schema = await client.execute("query-qmp-schema")
            assert isinstance(schema, list)
            by_name = check_schema(schema)
            assert {entry["name"] for entry in commands} <= set(by_name)

    runner.run(scenario())


def test_several_clients_get_every_event(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        async with (
            serving(socket_path) as served,
            connected(socket_path, "one") as one,
            connected(socket_path, "two") as two,
        ):
            with one.listener("JOB_STATUS_CHANGE") as first, two.listener() as second:
                await asyncio.gather(one.execute("query-version"), two.execute("query-version"))
                for status in ("created", "running"):
                    served.context.events.emit("JOB_STATUS_CHANGE", {"id": "j", "status": status})
                for listener in (first, second):
                    assert await _statuses(listener, 2) == ["created", "running"]

    runner.run(scenario())


async def _statuses(listener: EventListener, count: int) -> list[object]:
    async with asyncio.timeout(20):
        events: list[dict[str, Any]] = [dict(await listener.get()) for _ in range(count)]
    assert all(set(event["timestamp"]) == {"seconds", "microseconds"} for event in events)
    return [event["data"]["status"] for event in events]


def test_many_commands_at_once_are_all_answered(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        async with serving(socket_path), connected(socket_path) as client:
            versions = await asyncio.gather(*(client.execute("query-version") for _ in range(100)))
            assert len(versions) == 100

    runner.run(scenario())


def test_the_shell_works(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> str:
        async with serving(socket_path):
            shell = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "qemu.qmp.qmp_shell", str(socket_path)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "HOME": str(socket_path.parent)},  # where it writes its history
            )
            output, _ = await asyncio.wait_for(shell.communicate(b"query-version\nnope x=1\n"), 30)
            return output.decode()

    output = runner.run(scenario())
    assert '"package": "nbd-backend' in output
    assert "The command nope has not been found" in output


def test_it_sees_the_end_of_the_server(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        asked = asyncio.Event()
        async with serving(socket_path, quit=asked.set) as served:
            client = QMPClient("client")
            await client.connect(str(socket_path))
            await client.execute("quit")
            await asked.wait()
            await served.server.close()
            async with asyncio.timeout(20):
                with pytest.raises(EOFError):
                    await client.disconnect()

    runner.run(scenario())
