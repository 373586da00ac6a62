"""The ring reader, on a stand-in for the kernel's ring."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from nbd_backend.block.errors import KernelError
from nbd_backend.block.events import EventRing
from nbd_backend.block.kernel import Event, EventKind
from tests.unit.jobs.loops import both_loops


class FakeRing:
    """A ring that a test posts to."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events: list[Event] = []

    def ring_fd(self) -> int:
        return self._fd

    def ring_read(self) -> list[Event]:
        os.eventfd_read(self._fd)
        events, self._events = self._events, []
        return events

    def post(self, kind: EventKind, token: int, error: int = 0, a: int = 0) -> None:
        self._events.append(Event(kind, error, token, a, 0, 0))
        os.eventfd_write(self._fd, 1)


@both_loops
async def test_work_is_awaited_by_its_token_whatever_the_order() -> None:
    fake = FakeRing()
    with EventRing(fake) as ring:
        tokens: list[int] = []
        first, second = ring.event(tokens.append), ring.event(tokens.append)
        fake.post(EventKind.TASK, tokens[1], a=2)
        fake.post(EventKind.TASK, tokens[0], a=1)
        assert [(await first).a, (await second).a] == [1, 2]


@both_loops
async def test_an_error_in_the_event_is_raised_with_the_name_of_the_work() -> None:
    fake = FakeRing()
    with EventRing(fake) as ring:
        with pytest.raises(KernelError) as failed:
            await ring.run(
                lambda token: fake.post(EventKind.TASK, token, errno.ENOSPC), "Could not flush 'x'"
            )
        assert failed.value.message == "Could not flush 'x': No space left on device"
        assert failed.value.errno == errno.ENOSPC


@both_loops
async def test_work_that_cannot_start_raises_and_is_forgotten() -> None:
    def refuse(_: int) -> None:
        raise KernelError("no pool", errno.EAGAIN)

    with EventRing(FakeRing()) as ring, pytest.raises(KernelError, match="no pool"):
        await ring.run(refuse)


@both_loops
async def test_the_event_of_a_cancelled_awaiter_is_dropped() -> None:
    fake = FakeRing()
    with EventRing(fake) as ring:
        tokens: list[int] = []
        waiting = asyncio.ensure_future(ring.run(tokens.append))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        fake.post(EventKind.TASK, tokens[0])
        assert (await ring.event(lambda token: fake.post(EventKind.TASK, token, a=7))).a == 7


@both_loops
async def test_what_comes_unasked_goes_to_its_callback() -> None:
    fake = FakeRing()
    with EventRing(fake) as ring:
        corrupt: list[int] = []
        broken: list[int] = []
        ring.on(EventKind.CORRUPT, lambda event: corrupt.append(event.token))
        token = ring.new_token()
        unsubscribe = ring.subscribe(token, lambda event: broken.append(event.token))
        task = ring.event(lambda own: fake.post(EventKind.CORRUPT, own))  # a node id equal to a token
        fake.post(EventKind.CBW_BROKEN, token)
        await ring.event(lambda own: fake.post(EventKind.TASK, own))
        assert (len(corrupt), broken, task.done()) == (1, [token], False)
        unsubscribe()
        fake.post(EventKind.CBW_FULL, token)
        await ring.event(lambda own: fake.post(EventKind.TASK, own))
        assert broken == [token]


@both_loops
async def test_a_callback_that_fails_loses_no_other_event(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Event) -> None:
        raise ValueError("defect")

    fake = FakeRing()
    with EventRing(fake) as ring:
        ring.on(EventKind.CORRUPT, fail)
        fake.post(EventKind.CORRUPT, 1)
        await ring.event(lambda token: fake.post(EventKind.TASK, token))
    assert "please report this" in caplog.text


@both_loops
async def test_closing_cancels_who_still_waits() -> None:
    ring = EventRing(FakeRing())
    waiting = ring.event(lambda _: None)
    ring.close()
    assert waiting.cancelled()
