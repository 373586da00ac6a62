"""Events reach every subscriber; floods are thinned out to the last of each second."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from nbd_backend.control import events
from nbd_backend.control.events import EventBus
from tests.support.control import registry_of

DEFINITIONS = registry_of().events


class Listener:
    """Collects events; `came` is set when there is one."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.came = asyncio.Event()

    def deliver(self, message: bytes) -> None:
        self.received.append(json.loads(message))
        self.came.set()


def io_error(action: str, reason: str, path: str = "/a") -> dict[str, Any]:
    return {"qom-path": path, "device": "", "operation": "write", "action": action, "reason": reason}


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(debug=True) as running:
        yield running


def test_an_event_reaches_all_subscribers_with_its_time() -> None:
    bus = EventBus(DEFINITIONS, check=True, clock=lambda: 3_000_005_999)
    first, second = Listener(), Listener()
    bus.subscribe(first)
    bus.subscribe(second)
    bus.emit("JOB_STATUS_CHANGE", {"id": "j", "status": "running"})
    expected = {
        "event": "JOB_STATUS_CHANGE",
        "data": {"id": "j", "status": "running"},
        "timestamp": {"seconds": 3, "microseconds": 5},
    }
    assert first.received == second.received == [expected]


def test_who_unsubscribes_in_the_middle_of_an_event_does_not_disturb_the_others() -> None:
    bus = EventBus(DEFINITIONS)

    class Leaver(Listener):
        def deliver(self, message: bytes) -> None:
            bus.unsubscribe(self)
            super().deliver(message)

    listeners = [Leaver(), Listener()]
    for listener in listeners:
        bus.subscribe(listener)
    for _ in range(2):
        bus.emit("BLOCK_EXPORT_DELETED", {"id": "e"})
    assert [len(listener.received) for listener in listeners] == [1, 2]


def test_an_undefined_event_is_refused() -> None:
    with pytest.raises(KeyError):
        EventBus(DEFINITIONS).emit("NOPE", {})


def test_data_that_does_not_fit_the_definition_is_found_by_checking() -> None:
    with pytest.raises(msgspec.ValidationError):
        EventBus(DEFINITIONS, check=True).emit("JOB_STATUS_CHANGE", {"id": "j", "status": "zz"})


def test_of_a_flood_the_first_and_then_the_last_of_each_second_come(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LIMIT_INTERVAL", 0.02)

    async def scenario() -> None:
        bus, listener = EventBus(DEFINITIONS, check=True), Listener()
        bus.subscribe(listener)
        for number in range(100):
            bus.emit("BLOCK_IO_ERROR", io_error("report", str(number)))
        assert [event["data"]["reason"] for event in listener.received] == ["0"]
        listener.came.clear()
        await asyncio.wait_for(listener.came.wait(), 10)
        assert [event["data"]["reason"] for event in listener.received] == ["0", "99"]
        assert bus._windows  # the second after the last one has begun
        bus.close()

    runner.run(scenario())


def test_a_quiet_second_ends_the_limit(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LIMIT_INTERVAL", 0.0)

    async def scenario() -> None:
        bus = EventBus(DEFINITIONS)
        bus.emit("BLOCK_IO_ERROR", io_error("report", "a"))
        while bus._windows:  # noqa: ASYNC110  (the bus tells nobody when a window ends)
            await asyncio.sleep(0)
        bus.close()

    runner.run(asyncio.wait_for(scenario(), 10))


def test_devices_and_stops_are_not_thinned_out_by_each_other(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        bus, listener = EventBus(DEFINITIONS, check=True), Listener()
        bus.subscribe(listener)
        bus.emit("BLOCK_IO_ERROR", io_error("report", "a", "/a"))
        bus.emit("BLOCK_IO_ERROR", io_error("report", "b", "/b"))
        bus.emit("BLOCK_IO_ERROR", io_error("stop", "c", "/a"))
        bus.emit("BLOCK_IO_ERROR", io_error("stop", "d", "/a"))
        assert [event["data"]["reason"] for event in listener.received] == ["a", "b", "c", "d"]
        bus.close()

    runner.run(scenario())


def test_what_is_held_back_comes_when_the_bus_closes_and_nothing_later(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LIMIT_INTERVAL", 0.01)
    unhandled: list[dict[str, Any]] = []
    runner.get_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))

    async def scenario() -> None:
        bus, listener = EventBus(DEFINITIONS), Listener()
        bus.subscribe(listener)
        for reason in "ab":
            bus.emit("BLOCK_IO_ERROR", io_error("report", reason))
        bus.close()
        await asyncio.sleep(0.03)
        assert [event["data"]["reason"] for event in listener.received] == ["a", "b"]

    runner.run(scenario())
    assert not unhandled
