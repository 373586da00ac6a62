"""One monitor, without a socket: order, modes, and bounded memory whatever the client does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_backend.control.context import Context
from nbd_backend.control.errors import DeviceNotFound
from nbd_backend.control.registry import Registry, command
from nbd_backend.control.session import OUTBOUND_LIMIT, QUEUE_LENGTH, Session, State
from tests.support.control import make_context, registry_of


class FakeTransport:
    """Records what a session does with its connection."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.unread = 0
        self.reading = True
        self.end = "open"

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_write_buffer_size(self) -> int:
        return self.unread

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def reads(self) -> bool:
        return self.reading

    def close(self) -> None:
        self.end = "closed"

    def abort(self) -> None:
        self.end = "aborted"

    def messages(self) -> list[Any]:
        """What was sent since the last call."""
        found = [json.loads(line) for line in b"".join(self.written).splitlines()]
        self.written.clear()
        return found


class Gate:
    """A command that waits until it is let through; counts how often it began."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.began = 0

    def release_one(self) -> None:
        """Let through the command that waits now."""
        self.open.set()
        self.open.clear()

    def registry(self) -> Registry:
        @command("wait", since="1")
        async def wait(context: Context, arguments: None) -> None:
            self.began += 1
            await self.open.wait()

        @command("overtake", since="1", oob=True)
        async def overtake(context: Context, arguments: None) -> None:
            pass

        @command("fail", since="1")
        async def fail(context: Context, arguments: None) -> None:
            raise DeviceNotFound("no device")

        @command("break", since="1")
        async def break_(context: Context, arguments: None) -> None:
            raise ZeroDivisionError("by zero")

        return registry_of(wait=wait, overtake=overtake, fail=fail, break_=break_)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(debug=True) as running:
        yield running


async def settle() -> None:
    """Let everything happen that can."""
    for _ in range(50):
        await asyncio.sleep(0)


class Monitor:
    """A session on a fake transport."""

    def __init__(self, registry: Registry | None = None) -> None:
        self.gate = Gate()
        self.context = make_context(registry or self.gate.registry())
        self.transport = FakeTransport()
        self.ended = 0
        self.session = Session(self.context, self.transport, self._end)

    def _end(self, session: Session) -> None:
        self.ended += 1

    async def exchange(self, *messages: dict[str, Any] | bytes) -> list[Any]:
        """Send messages and return what comes of them."""
        self.transport.messages()
        data = b"".join(item if isinstance(item, bytes) else json.dumps(item).encode() for item in messages)
        self.session.receive(data)
        await settle()
        return self.transport.messages()

    async def negotiate(self, *enable: str) -> None:
        reply = await self.exchange({"execute": "qmp_capabilities", "arguments": {"enable": enable}})
        assert reply == [{"return": {}}]


def test_only_negotiation_is_accepted_at_first(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        (reply,) = await monitor.exchange({"execute": "wait", "id": 1})
        assert reply == {
            "error": {
                "class": "CommandNotFound",
                "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
            },
            "id": 1,
        }
        await monitor.negotiate()
        (reply,) = await monitor.exchange({"execute": "qmp_capabilities"})
        assert reply["error"] == {
            "class": "CommandNotFound",
            "desc": "Capabilities negotiation is already complete, command ignored",
        }

    runner.run(scenario())


def test_a_refused_negotiation_changes_nothing(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        (reply,) = await monitor.exchange({"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}})
        assert reply["error"]["class"] == "GenericError"
        assert monitor.session.state is State.NEGOTIATING

    runner.run(scenario())


def test_a_request_behind_the_negotiation_meets_the_mode_that_it_brings(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        enable = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
        replies = await Monitor().exchange(enable, {"exec-oob": "overtake", "id": 1})
        assert replies == [{"return": {}}, {"return": {}, "id": 1}]

    runner.run(scenario())


def test_no_event_comes_before_negotiation(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        monitor.transport.messages()
        monitor.context.events.emit("BLOCK_EXPORT_DELETED", {"id": "e"})
        assert monitor.transport.messages() == []
        await monitor.negotiate()
        monitor.context.events.emit("BLOCK_EXPORT_DELETED", {"id": "e"})
        (event,) = monitor.transport.messages()
        assert event["event"] == "BLOCK_EXPORT_DELETED"

    runner.run(scenario())


def test_replies_come_in_the_order_of_the_requests_even_for_bad_ones(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate()
        assert await monitor.exchange({"execute": "wait", "id": 1}, b"}", {"execute": "fail", "id": 3}) == []
        monitor.gate.open.set()
        await settle()
        first, second, third = monitor.transport.messages()
        assert first == {"return": {}, "id": 1}
        assert second["error"]["desc"] == "JSON parse error, expecting value"
        assert third == {"error": {"class": "DeviceNotFound", "desc": "no device"}, "id": 3}

    runner.run(scenario())


def test_an_out_of_band_command_overtakes_those_that_wait(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate("oob")
        replies = await monitor.exchange(
            {"execute": "wait", "id": 1}, {"execute": "wait", "id": 2}, {"exec-oob": "overtake", "id": 3}
        )
        assert replies == [{"return": {}, "id": 3}]
        monitor.gate.open.set()
        await settle()
        assert [reply["id"] for reply in monitor.transport.messages()] == [1, 2]

    runner.run(scenario())


def test_a_command_without_support_refuses_to_overtake(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate("oob")
        (reply,) = await monitor.exchange({"exec-oob": "wait", "id": 1})
        assert reply["error"] == {"class": "GenericError", "desc": "The command wait does not support OOB"}
        assert monitor.gate.began == 0

    runner.run(scenario())


def test_commands_of_one_monitor_run_one_after_the_other(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate()
        await monitor.exchange(*[{"execute": "wait"}] * 3)
        assert monitor.gate.began == 1

    runner.run(scenario())


def test_reading_stops_at_a_full_queue_and_goes_on_when_it_drains(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate()
        total = 3 * QUEUE_LENGTH
        await monitor.exchange(*[{"execute": "wait"}] * (QUEUE_LENGTH - 1))
        assert monitor.transport.reads()
        await monitor.exchange(*[{"execute": "wait"}] * (total - QUEUE_LENGTH + 1))
        assert not monitor.transport.reads()
        assert len(monitor.session._in_band.waiting) == QUEUE_LENGTH
        monitor.gate.open.set()
        await settle()
        assert monitor.transport.reads()
        assert len(monitor.transport.messages()) == total

    runner.run(scenario())


def test_reading_goes_on_as_soon_as_one_place_is_free(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate("oob")
        full: list[dict[str, Any]] = [{"execute": "wait"}] * (QUEUE_LENGTH + 1)
        assert await monitor.exchange(*full, {"execute": "wait"}, {"exec-oob": "overtake", "id": "oob"}) == []
        assert not monitor.transport.reads()
        monitor.gate.release_one()
        await settle()
        assert monitor.transport.messages() == [{"return": {}}]
        assert not monitor.transport.reads()
        monitor.gate.release_one()
        await settle()
        assert monitor.transport.messages() == [{"return": {}}, {"return": {}, "id": "oob"}]
        assert monitor.transport.reads()
        monitor.gate.open.set()
        await settle()

    runner.run(scenario())


def test_nothing_is_run_for_a_client_that_does_not_read(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate("oob")
        monitor.session.pause_writing()
        requests = [{"execute": "fail"}, {"exec-oob": "overtake"}] * 20
        assert await monitor.exchange(*requests) == []
        assert not monitor.transport.reads()
        monitor.session.resume_writing()
        await settle()
        assert len(monitor.transport.messages()) == 40
        assert monitor.transport.reads()

    runner.run(scenario())


def test_a_client_that_leaves_too_many_events_unread_is_cut_off(
    runner: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate()
        monitor.transport.unread = OUTBOUND_LIMIT
        monitor.context.events.emit("BLOCK_EXPORT_DELETED", {"id": "e"})
        assert monitor.transport.end == "aborted"
        assert monitor.transport.messages() == []
        monitor.context.events.emit("BLOCK_EXPORT_DELETED", {"id": "e"})

    runner.run(scenario())
    assert f"left {OUTBOUND_LIMIT} bytes unread" in caplog.text


def test_a_client_that_has_finished_gets_its_replies_and_then_the_end(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate()
        await monitor.exchange({"execute": "wait"}, {"execute": "fail"})
        monitor.session.finish()
        assert monitor.transport.end == "open"
        monitor.gate.open.set()
        await settle()
        assert len(monitor.transport.messages()) == 2
        assert monitor.transport.end == "closed"

    runner.run(scenario())


def test_an_idle_client_that_has_finished_is_closed_at_once(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        monitor.session.finish()
        assert monitor.transport.end == "closed"

    runner.run(scenario())


def test_a_lost_monitor_finishes_its_command_and_drops_the_others(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate()
        await monitor.exchange({"execute": "wait"}, {"execute": "wait"})
        monitor.session.lost()
        monitor.gate.open.set()
        await settle()
        monitor.context.events.emit("BLOCK_EXPORT_DELETED", {"id": "e"})
        assert (monitor.gate.began, monitor.ended) == (1, 1)
        assert monitor.transport.messages() == []

    runner.run(scenario())


def test_a_defect_in_a_command_is_logged_and_the_session_goes_on(
    runner: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        await monitor.negotiate()
        broken, failed = await monitor.exchange({"execute": "break"}, {"execute": "fail"})
        assert broken["error"]["class"] == "GenericError"
        assert "ZeroDivisionError: by zero" in broken["error"]["desc"]
        assert failed["error"]["class"] == "DeviceNotFound"

    runner.run(scenario())
    assert "ZeroDivisionError" in caplog.text


requests = st.sampled_from(
    [
        b'{"execute":"fail"}',
        b'{"exec-oob":"overtake"}',
        b"}",
        b'{"execute":"qmp_capabilities"}',
        b"\xff",
        b'{"id":',
    ]
)


@given(st.lists(requests | st.binary(max_size=20) | st.sampled_from(["pause", "resume"]), max_size=60))
def test_nothing_that_a_client_does_breaks_a_session_or_its_bounds(actions: list[bytes | str]) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        for action in actions:
            if action == "pause":
                monitor.session.pause_writing()
            elif action == "resume":
                monitor.session.resume_writing()
            elif isinstance(action, bytes) and monitor.transport.reads():
                monitor.session.receive(action)
            assert len(monitor.session._in_band.waiting) <= QUEUE_LENGTH
            assert len(monitor.session._oob.waiting) <= QUEUE_LENGTH
            await asyncio.sleep(0)
        monitor.session.resume_writing()
        await settle()
        assert monitor.transport.reads()
        monitor.transport.messages()
        replies = await monitor.exchange(b"\xff", {"execute": "nope", "id": "end"})
        assert replies[-1]["id"] == "end"

    asyncio.run(scenario())
