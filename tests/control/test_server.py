"""The server on a real socket: several monitors, hostile and slow clients, a clean end."""

from __future__ import annotations

import asyncio
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from nbd_backend.control import server, session
from nbd_backend.control.context import Context
from nbd_backend.control.registry import Registry, command
from nbd_backend.sockets import AddressError
from tests.support.control import RawClient, registry_of, serving


def waiting_registry(entered: asyncio.Event, leave: asyncio.Event) -> Registry:
    """A registry with a command that says when it began and ends when told."""

    @command("wait", since="1")
    async def wait(context: Context, arguments: None) -> None:
        entered.set()
        await leave.wait()

    return registry_of(wait=wait)


async def until(condition: Any) -> None:
    """Wait until ``condition()`` holds; fail after a while."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (it comes true inside the server, which tells nobody)
            await asyncio.sleep(0.001)


def test_only_the_owner_can_connect(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        async with serving(socket_path):
            pass

    runner.run(scenario())
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600


def test_a_socket_in_use_is_refused_and_a_stale_one_replaced(
    runner: asyncio.Runner, socket_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(socket_path) as first:
            with pytest.raises(AddressError, match=str(socket_path)):
                await first.server.listen(str(socket_path))
        async with serving(socket_path):
            await (await RawClient.connect(socket_path)).close()

    runner.run(scenario())


def test_monitors_are_independent_and_all_get_events(runner: asyncio.Runner, socket_path: Path) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def scenario() -> None:
        async with serving(socket_path, waiting_registry(entered, leave)) as served:
            clients = [await RawClient.connect(socket_path) for _ in range(3)]
            silent = await RawClient.connect(socket_path, negotiate=False)
            clients[0].send({"execute": "wait", "id": "slow"})
            await entered.wait()
            assert "qemu" in (await clients[1].execute("query-version"))["return"]
            served.context.events.emit("JOB_STATUS_CHANGE", {"id": "j", "status": "created"})
            for client in clients:
                assert (await client.receive())["event"] == "JOB_STATUS_CHANGE"
            leave.set()
            assert await clients[0].receive() == {"return": {}, "id": "slow"}
            silent.send({"execute": "qmp_capabilities"})
            assert await silent.receive() == {"return": {}}
            for client in [*clients, silent]:
                await client.close()
            await until(lambda: served.server.monitors == 0)

    runner.run(scenario())


def test_requests_may_come_in_any_pieces(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        async with serving(socket_path):
            client = await RawClient.connect(socket_path)
            for (
                byte
            ) in b'{ "execute":\r\n "query-version", "id": "one" }{"execute":"query-version","id":"two"}':
                client.send(bytes([byte]))
                await asyncio.sleep(0)
            assert [(await client.receive())["id"] for _ in range(2)] == ["one", "two"]
            await client.close()

    runner.run(scenario())


def test_a_client_that_closes_its_side_still_gets_its_replies(
    runner: asyncio.Runner, socket_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(socket_path):
            client = await RawClient.connect(socket_path)
            client.send(*[{"execute": "query-version", "id": number} for number in range(30)])
            client.writer.write_eof()
            assert [(await client.receive())["id"] for _ in range(30)] == list(range(30))
            with pytest.raises(EOFError):
                await client.receive()
            await client.close()

    runner.run(scenario())


def test_a_client_that_never_reads_costs_bounded_memory_and_harms_nobody(
    runner: asyncio.Runner, socket_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(socket_path) as served:
            deaf = await RawClient.connect(socket_path)
            # asyncio has no public way to stop reading from a stream.
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
            deaf.send(*[{"execute": "query-qmp-schema"}] * 2000)
            await until(lambda: not _sessions(served.server)[0]._writable)
            (stuck,) = _sessions(served.server)
            other = await RawClient.connect(socket_path)
            assert "return" in await other.execute("query-version")
            assert len(stuck._in_band.waiting) <= session.QUEUE_LENGTH
            assert stuck._transport.get_write_buffer_size() < 1 << 20
            deaf.writer.transport.abort()
            await other.close()
            await until(lambda: served.server.monitors == 0)

    runner.run(scenario())


def test_a_client_that_reads_no_events_is_cut_off(
    runner: asyncio.Runner, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(socket_path) as served:
            deaf = await RawClient.connect(socket_path)
            # asyncio has no public way to stop reading from a stream.
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
            event = {"id": "x" * 100_000}
            async with asyncio.timeout(20):
                while served.server.monitors:
                    served.context.events.emit("BLOCK_EXPORT_DELETED", event)
                    await asyncio.sleep(0)
            deaf.writer.transport.abort()

    runner.run(scenario())
    assert "bytes unread" in caplog.text


def _sessions(running: server.QMPServer) -> list[session.Session]:
    return list(running._sessions)


def test_an_endless_token_is_refused_and_the_monitor_goes_on(
    runner: asyncio.Runner, socket_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(socket_path):
            client = await RawClient.connect(socket_path)
            client.send(b'{"execute":"', b"a" * (5 << 20), b'"}\n{"execute":"query-version","id":1}')
            errors = []
            while "id" not in (message := await client.receive()):
                errors.append(message["error"]["desc"])
            assert errors[0] == "JSON token size limit exceeded"
            assert "return" in message
            await client.close()

    runner.run(scenario())


def test_quit_is_answered_before_the_server_goes(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        asked = asyncio.Event()
        async with serving(socket_path, quit=asked.set) as served:
            client = await RawClient.connect(socket_path)
            client.send({"execute": "quit", "id": 1})
            await asked.wait()
            await served.server.close()
            assert await client.receive() == {"return": {}, "id": 1}
            with pytest.raises(EOFError):
                await client.receive()
            await client.close()

    runner.run(scenario())


def test_closing_cancels_what_runs_and_disconnects_everyone(
    runner: asyncio.Runner, socket_path: Path
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def scenario() -> None:
        async with serving(socket_path, waiting_registry(entered, leave)) as served:
            client = await RawClient.connect(socket_path)
            client.send({"execute": "wait"})
            await entered.wait()
            await served.server.close()
            await served.server.close()
            with pytest.raises(EOFError):
                await client.receive()
            with pytest.raises(OSError, match=r"."):
                await RawClient.connect(socket_path)
            await client.close()
            assert len(asyncio.all_tasks()) == 1

    runner.run(scenario())


def test_closing_does_not_wait_for_a_client_that_does_not_read(
    runner: asyncio.Runner, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLOSE_TIMEOUT", 0.05)

    async def scenario() -> None:
        async with serving(socket_path) as served:
            deaf = await RawClient.connect(socket_path)
            # asyncio has no public way to stop reading from a stream.
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
            deaf.send(*[{"execute": "query-qmp-schema"}] * 200)
            await until(lambda: not _sessions(served.server)[0]._writable)
            async with asyncio.timeout(10):
                await served.server.close()
            deaf.writer.transport.abort()

    runner.run(scenario())


def test_a_command_outlives_its_monitor_but_not_the_server(runner: asyncio.Runner, socket_path: Path) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def scenario() -> None:
        async with serving(socket_path, waiting_registry(entered, leave)) as served:
            client = await RawClient.connect(socket_path)
            client.send({"execute": "wait"})
            await entered.wait()
            client.writer.transport.abort()
            served.context.events.emit("BLOCK_EXPORT_DELETED", {"id": "finds out that the client is gone"})
            await until(lambda: served.server.monitors == 0)
            assert len(asyncio.all_tasks()) == 2
            await served.server.close()
            assert len(asyncio.all_tasks()) == 1

    runner.run(scenario())


def test_a_round_trip_takes_far_less_than_a_millisecond(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> float:
        async with serving(socket_path):
            client = await RawClient.connect(socket_path)
            times = []
            for _ in range(200):
                start = time.perf_counter()
                await client.execute("query-version")
                times.append(time.perf_counter() - start)
            await client.close()
            return sorted(times)[len(times) // 4]

    # The client's share and asyncio's debug mode are in it; the best quarter: other tests share the machine.
    assert runner.run(scenario()) < 0.005
