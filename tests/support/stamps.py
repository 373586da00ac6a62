"""A guest that stamps what it writes, so that any copy of its disk can be told to be of one moment, or not.

Every sector that a write changes holds the write's number, eight bytes repeated; zeroes and trims leave zero.
All writes are remembered with two ticks of one logical clock: before they were sent, after they were
answered. So for any two ticks it is known which writes a copy of the disk, taken between them, may show.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from tests.support.nbd_client import Address, Command, NbdClient

SECTOR = 512
CLUSTER = 64 << 10
_NEVER = 1 << 62


@dataclass(slots=True)
class Write:
    """One request: `value` is what its sectors hold afterwards, the ticks say when it may have happened."""

    value: int
    sent: int
    answered: int = _NEVER


class Moment(NamedTuple):
    """Something that happened after tick `begin` and before tick `end`."""

    begin: int
    end: int


def stamp(value: int) -> bytes:
    """What a sector of this value holds."""
    return value.to_bytes(8, "little") * (SECTOR // 8)


class StampingGuest:
    """Writes a disk at random from several connections at once while the block runs, and remembers it all.

    The disk has to be zero when it begins. A failed request fails the block's end.
    """

    def __init__(
        self, address: Address, size: int, *, seed: int, connections: int = 3, depth: int = 8
    ) -> None:
        self._address = address
        self._depth = depth
        self._clock = itertools.count(1)
        self._history: list[list[Write]] = [[Write(0, 0, 0)] for _ in range(size // SECTOR)]
        self._lock = threading.Lock()  # of the history
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(random.Random(f"{seed}/{number}"),))
            for number in range(connections)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        if error is None and self._failures:
            raise self._failures[0]

    @property
    def writes(self) -> int:
        """How many requests were sent so far, and a little more."""
        return next(self._clock)

    def tick(self) -> int:
        """The time now."""
        return next(self._clock)

    def wrong(self, content: bytes, moment: Moment) -> list[str]:
        """What in `content`, a copy of the disk as it was at some time in `moment`, cannot have been there.

        Forgets what no copy of a later moment can show.
        """
        problems = []
        with self._lock:
            for number, history in enumerate(self._history):
                data = content[number * SECTOR : (number + 1) * SECTOR]
                value = int.from_bytes(data[:8], "little")
                possible = _possible(history, moment)
                if data != stamp(value) or value not in [write.value for write in possible]:
                    problems.append(f"sector {number}: {value}, expected one of {possible}")
                newer = [write for write in history if write.sent >= moment.end]
                self._history[number] = [*possible, *newer]
        return problems

    def _guarded(self, choose: random.Random) -> None:
        try:
            with NbdClient(self._address) as client:
                self._write(client, choose)
        except BaseException as failure:
            self._failures.append(failure)

    def _write(self, client: NbdClient, choose: random.Random) -> None:
        flying: deque[tuple[int, Write]] = deque()
        while not self._stop.is_set():
            flying.append(self._submit(client, choose))
            if len(flying) >= self._depth:
                _settle(client, flying, self._clock)
        while flying:
            _settle(client, flying, self._clock)

    def _submit(self, client: NbdClient, choose: random.Random) -> tuple[int, Write]:
        sectors = len(self._history)
        kind = choose.choices([Command.WRITE, Command.WRITE_ZEROES, Command.TRIM], [12, 2, 1])[0]
        if kind is Command.WRITE:
            length = min(sectors, choose.choice([1, 3, 8, 8, 8, 32, 200]))
            first = choose.randrange(sectors - length + 1)
        else:
            # Whole clusters: what a trim does to a part of one is the server's choice.
            whole = CLUSTER // SECTOR
            length = whole * choose.choice([1, 1, 2])
            first = choose.randrange((sectors - length) // whole + 1) * whole
        write = Write(0, next(self._clock))
        data = b""
        if kind is Command.WRITE:
            write.value = write.sent
            data = stamp(write.value) * length
        with self._lock:
            for history in self._history[first : first + length]:
                history.append(write)
        cookie = client.submit(kind, first * SECTOR, length * SECTOR, data=data)
        return cookie, write


def _settle(client: NbdClient, flying: deque[tuple[int, Write]], clock: itertools.count[int]) -> None:
    cookie, write = flying.popleft()
    client.wait(cookie)
    write.answered = next(clock)


def _possible(history: list[Write], moment: Moment) -> list[Write]:
    """The writes of one sector whose value can be seen at some time in `moment`."""
    # Whatever was answered before the latest begin of a write that was over in time, has been overwritten.
    last = max((write.sent for write in history if write.answered < moment.begin), default=0)
    return [write for write in history if write.sent < moment.end and write.answered >= last]
