"""base:allocation through whole chains, against qemu-img map and qemu-nbd on the same chain."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.datapath.conftest import MIB, Serve
from tests.support import images
from tests.support.nbd_client import Command, Extent, Flag, NbdClient, State
from tests.support.qemu_nbd import qemu_nbd

CLUSTER = 65536
DATA, ZERO, HOLE = State(0), State.ZERO, State.HOLE | State.ZERO


def runs(states: Iterable[tuple[State, int]]) -> list[Extent]:
    """Extents from states and their lengths in clusters, neighbours merged."""
    merged: list[Extent] = []
    offset = 0
    for state, clusters in states:
        length = clusters * CLUSTER
        if merged and merged[-1].state == state:
            merged[-1] = merged[-1]._replace(length=merged[-1].length + length)
        else:
            merged.append(Extent(offset, length, state))
        offset += length
    return merged


def zero_runs(extents: Sequence[Extent]) -> list[tuple[int, int]]:
    """Where the disk is known to read as zeroes, as (start, end), neighbours merged."""
    merged: list[tuple[int, int]] = []
    for extent in extents:
        if not extent.state & State.ZERO:
            continue
        if merged and merged[-1][1] == extent.offset:
            merged[-1] = merged[-1][0], extent.offset + extent.length
        else:
            merged.append((extent.offset, extent.offset + extent.length))
    return merged


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three layers that show every kind of cluster; the states are those of test_every_kind_of_cluster."""
    base = images.create(tmp_path / "base.raw", 12 * CLUSTER, fmt="raw")
    images.qemu_io(base, "write -P 1 0 128k", "write -P 1 256k 64k", "write -P 1 640k 128k", fmt="raw")
    middle = images.create(tmp_path / "middle.qcow2", 16 * CLUSTER, backing=base, backing_fmt="raw")
    images.qemu_io(
        middle,
        "write -P 2 128k 64k",  # 2: data over a hole
        "write -z 256k 64k",  # 4: zeroes over data
        "write -P 2 320k 64k", "write -z 320k 64k",  # 5: zeroes, space kept
        "write -c -P 2 384k 64k",  # 6: compressed
        "write -P 2 896k 64k",  # 14: data beyond the base
    )  # fmt: skip
    top = images.create(tmp_path / "top.qcow2", 20 * CLUSTER, backing=middle)
    images.qemu_io(
        top,
        "write -z -u 0 64k",  # 0: zeroes over data two layers below
        "write -P 3 448k 64k",  # 7
        "write -P 3 512k 64k", "write -z 512k 64k",  # 8: zeroes, space kept
        "write -P 3 1216k 64k",  # 19: the last one
    )  # fmt: skip
    return top


def test_every_kind_of_cluster_in_a_chain(serve: Serve, chain: Path) -> None:
    with serve(chain) as server, NbdClient(server.nbd_path) as client:
        assert client.map() == runs(
            [
                (HOLE, 1), (DATA, 2), (HOLE, 2), (ZERO, 1), (DATA, 2), (ZERO, 1), (HOLE, 1),
                (DATA, 2), (HOLE, 2), (DATA, 1), (HOLE, 4), (DATA, 1),
            ]
        )  # fmt: skip


def test_zero_runs_are_those_of_qemu_img_map_and_qemu_nbd(serve: Serve, chain: Path, tmp_path: Path) -> None:
    mapped = [
        Extent(entry["start"], entry["length"], ZERO if entry["zero"] else DATA)
        for entry in images.extents(chain)
    ]
    with qemu_nbd(chain, tmp_path / "qemu.sock", read_only=True) as socket, NbdClient(socket) as reference:
        theirs = reference.map()
    with serve(chain) as server, NbdClient(server.nbd_path) as client:
        ours = client.map()
    assert zero_runs(ours) == zero_runs(mapped) == zero_runs(theirs)


@pytest.mark.parametrize("seed", range(6))
def test_random_chains_against_qemu_nbd(serve: Serve, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    image: Path | None = None
    for depth in range(rng.randint(1, 4)):
        size = rng.randint(4, 24) * 2 * CLUSTER if depth else 32 * CLUSTER
        cluster = rng.choice([4096, CLUSTER, 2 * CLUSTER])
        image = images.create(
            tmp_path / f"{depth}.qcow2", size, backing=image, options={"cluster_size": cluster}
        )
        images.qemu_io(image, *(random_write(rng, size // cluster, cluster) for _ in range(8)))
    assert image is not None
    with qemu_nbd(image, tmp_path / "qemu.sock", read_only=True) as socket, NbdClient(socket) as reference:
        theirs = reference.map()
    with serve(image) as server, NbdClient(server.nbd_path) as client:
        ours = client.map()
        start = rng.randrange(client.size)
        assert client.map(start) == cut(ours, start)
    assert zero_runs(ours) == zero_runs(theirs)


def cut(extents: Sequence[Extent], start: int) -> list[Extent]:
    """What of the extents lies at or after `start`."""
    ends = [(extent, extent.offset + extent.length) for extent in extents]
    return [
        Extent(max(extent.offset, start), end - max(extent.offset, start), extent.state)
        for extent, end in ends
        if end > start
    ]


def random_write(rng: random.Random, clusters: int, cluster: int) -> str:
    """A qemu-io command that changes some clusters."""
    first = rng.randrange(clusters)
    count = rng.randint(1, clusters - first)
    command = rng.choice(["write -P 0x11", "write -z", "write -z -u", "discard"])
    return f"{command} {first * cluster} {count * cluster}"


def test_a_reply_with_one_extent_ends_within_the_request(serve: Serve, chain: Path) -> None:
    with serve(chain) as server, NbdClient(server.nbd_path) as client:
        assert client.block_status(100, 1000, flags=Flag.REQ_ONE) == [Extent(100, 1000, HOLE)]
        [extent] = client.block_status(CLUSTER - 100, MIB, flags=Flag.REQ_ONE)
        assert extent == Extent(CLUSTER - 100, 100, HOLE)


def test_block_status_follows_what_the_client_writes(client: NbdClient) -> None:
    assert client.map() == [Extent(0, client.size, HOLE)]
    client.write(CLUSTER + 7, b"x")
    client.write(3 * CLUSTER, b"x" * CLUSTER)
    client.zero(3 * CLUSTER, CLUSTER, flags=Flag.NO_HOLE)
    assert client.map(0, 5 * CLUSTER) == runs([(HOLE, 1), (DATA, 1), (HOLE, 1), (ZERO, 1), (HOLE, 1)])
    client.trim(CLUSTER, 3 * CLUSTER)
    assert client.map() == [Extent(0, client.size, HOLE)]


def test_many_extents_in_one_reply(serve: Serve, tmp_path: Path) -> None:
    disk = images.create(tmp_path / "fine.qcow2", 4 * MIB, options={"cluster_size": 512})
    with serve(disk) as server, NbdClient(server.nbd_path) as client:
        cookies = [
            client.submit(Command.WRITE, offset, 512, data=b"x" * 512) for offset in range(0, MIB, 1024)
        ]
        for cookie in cookies:
            client.wait(cookie)
        extents = client.map()
        assert len(extents) == 2048
        assert extents[5] == Extent(5 * 512, 512, HOLE)


def test_holes_of_a_raw_disk(serve: Serve, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as empty:
        empty.truncate(8 * MIB)
    with serve(disk, options=["--format", "raw"]) as server, NbdClient(server.nbd_path) as client:
        client.write(MIB, b"\x11" * MIB)
        assert client.map() == [Extent(0, MIB, HOLE), Extent(MIB, MIB, DATA), Extent(2 * MIB, 6 * MIB, HOLE)]
        client.zero(MIB, MIB)
        assert zero_runs(client.map()) == [(0, 8 * MIB)]


def test_status_of_a_vast_disk_is_quick(serve: Serve, tmp_path: Path) -> None:
    disk = images.create(tmp_path / "vast.qcow2", 1 << 42)
    with serve(disk) as server, NbdClient(server.nbd_path) as client:
        client.write((1 << 42) - 4096, b"\x11" * 4096)
        assert client.map() == [
            Extent(0, (1 << 42) - CLUSTER, HOLE),
            Extent((1 << 42) - CLUSTER, CLUSTER, DATA),
        ]
