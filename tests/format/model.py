"""A plain model of a disk, and operations that are applied to it and to an NBD server at once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from tests.support.nbd_client import NO_FLAGS, Flag, NbdClient, State

Kind = Literal["write", "zero", "zero, keep space", "trim", "flush", "read"]
_SOURCE = random.Random(2024).randbytes(16 << 20)
_STARTS = 4 << 20


@dataclass(frozen=True)
class Operation:
    """One request; `seed` chooses the data of a write."""

    kind: Kind
    offset: int = 0
    count: int = 0
    seed: int = 0
    fua: bool = False

    def data(self) -> bytes:
        """What a write writes: other data at every offset and for every seed, so that nothing is mistaken."""
        start = (self.offset + self.seed * 7919) % _STARTS
        assert start + self.count <= len(_SOURCE)
        return _SOURCE[start : start + self.count]


class Disk:
    """A disk behind an NBD connection together with the bytes that it must hold.

    A trim may leave the old bytes or zeroes, decided cluster by cluster; what it did is read back and becomes
    part of the model. With `trim_zeroes` every cluster that is trimmed as a whole must read as zeroes.
    """

    def __init__(self, client: NbdClient, content: bytes, cluster_size: int, *, trim_zeroes: bool) -> None:
        self._client = client
        self._cluster_size = cluster_size
        self._trim_zeroes = trim_zeroes
        self.content = bytearray(content)
        assert client.size == len(content)

    def apply(self, operation: Operation) -> None:
        """Send the request and do the same to the model."""
        flags = Flag.FUA if operation.fua else NO_FLAGS
        offset, count = operation.offset, operation.count
        end = offset + count
        if operation.kind == "flush":
            self._client.flush()
        elif operation.kind == "read":
            self._expect(offset, count)
        elif operation.kind == "write":
            data = operation.data()
            self._client.write(offset, data, flags=flags)
            self.content[offset:end] = data
        elif operation.kind == "trim":
            self._client.trim(offset, count, flags=flags)
            self._take_trimmed(offset, end)
        else:
            keep = Flag.NO_HOLE if operation.kind == "zero, keep space" else NO_FLAGS
            self._client.zero(offset, count, flags=flags | keep)
            self.content[offset:end] = bytes(count)

    def verify(self) -> None:
        """Read everything, and compare what block status claims to be zero."""
        self._expect(0, len(self.content))
        for extent in self._client.map():
            if extent.state & State.ZERO:
                end = extent.offset + extent.length
                assert not any(self.content[extent.offset : end]), f"{extent} is not zero"

    def _expect(self, offset: int, count: int) -> None:
        got = self._client.read(offset, count)
        want = self.content[offset : offset + count]
        if got != want:
            where = next(index for index in range(count) if got[index] != want[index])
            raise AssertionError(
                f"byte {offset + where} reads as {got[where]:#04x}, expected {want[where]:#04x}"
                f" (in a read of {count} at {offset})"
            )

    def _take_trimmed(self, offset: int, end: int) -> None:
        got = self._client.read(offset, end - offset)
        start = offset
        while start < end:
            stop = min(end, start - start % self._cluster_size + self._cluster_size)
            self._take_trimmed_cluster(start, stop, got[start - offset : stop - offset])
            start = stop

    def _take_trimmed_cluster(self, start: int, stop: int, got: bytes) -> None:
        zeroed = not any(got)
        assert zeroed or got == self.content[start:stop], f"trim changed {start}..{stop} to other data"
        whole = start % self._cluster_size == 0 and (
            stop - start == self._cluster_size or stop == len(self.content)
        )
        assert zeroed or not (self._trim_zeroes and whole), f"trimmed cluster {start}..{stop} keeps its data"
        self.content[start:stop] = got
