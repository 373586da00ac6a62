"""What each request does to the disk, one client at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.datapath.conftest import MIB, Serve
from tests.support import images
from tests.support.nbd_client import Command, Extent, Flag, NbdClient, NbdError, State

CLUSTER = 65536


@pytest.mark.parametrize(
    ("offset", "count"),
    [(0, 1), (511, 2), (4096, 4096), (CLUSTER - 1, 2), (CLUSTER, CLUSTER), (100, 3 * MIB), (8 * MIB - 7, 7)],
)
def test_data_written_is_read_back_and_nothing_around_it_changes(
    client: NbdClient, disk: Path, offset: int, count: int
) -> None:
    data = random.Random(count).randbytes(count)
    client.write(offset, data)
    whole = client.read(0, client.size)
    assert whole[offset : offset + count] == data
    assert not any(whole[:offset])
    assert not any(whole[offset + count :])


def test_largest_request(serve: Serve, tmp_path: Path) -> None:
    disk = images.create(tmp_path / "large.qcow2", 64 * MIB)
    data = random.Random(1).randbytes(32 * MIB)
    with serve(disk) as server, NbdClient(server.nbd_path) as client:
        client.write(12345, data)
        assert client.read(12345, len(data)) == data
        with pytest.raises((NbdError, ConnectionError)):
            client.write(0, bytes(65 * MIB))


def test_write_zeroes_reads_as_zeroes_and_keeps_its_surroundings(client: NbdClient) -> None:
    client.write(0, b"\xaa" * MIB)
    client.zero(1000, 300_000)
    client.zero(500_000, 200_000, flags=Flag.NO_HOLE)
    got = client.read(0, MIB)
    expected = bytearray(b"\xaa" * MIB)
    expected[1000:301_000] = bytes(300_000)
    expected[500_000:700_000] = bytes(200_000)
    assert got == expected


def test_write_zeroes_frees_clusters_unless_no_hole(client: NbdClient) -> None:
    client.write(0, b"\xaa" * (4 * CLUSTER))
    client.zero(0, CLUSTER)
    client.zero(2 * CLUSTER, CLUSTER, flags=Flag.NO_HOLE)
    assert client.map(0, 4 * CLUSTER) == [
        Extent(0, CLUSTER, State.HOLE | State.ZERO),
        Extent(CLUSTER, CLUSTER, State(0)),
        Extent(2 * CLUSTER, CLUSTER, State.ZERO),
        Extent(3 * CLUSTER, CLUSTER, State(0)),
    ]


def test_fast_zero_of_whole_clusters_is_fast(client: NbdClient) -> None:
    client.write(0, b"\xaa" * (4 * CLUSTER))
    client.zero(0, 4 * CLUSTER, flags=Flag.FAST_ZERO)
    assert client.read(0, 4 * CLUSTER) == bytes(4 * CLUSTER)


def test_fast_zero_zeroes_or_refuses_what_is_not_whole_clusters(client: NbdClient) -> None:
    client.write(0, b"\xaa" * (2 * CLUSTER))
    expected = bytearray(b"\xaa" * (2 * CLUSTER))
    try:
        client.zero(100, CLUSTER, flags=Flag.FAST_ZERO)
    except NbdError as error:
        refused = error.name
    else:
        refused = ""
        expected[100 : 100 + CLUSTER] = bytes(CLUSTER)
    assert refused in ("", "ENOTSUP")
    assert client.read(0, 2 * CLUSTER) == expected


def test_trim_frees_whole_clusters_and_leaves_parts_alone(client: NbdClient) -> None:
    client.write(0, b"\xaa" * (4 * CLUSTER))
    client.trim(1, 3 * CLUSTER)
    got = client.read(0, 4 * CLUSTER)
    assert got[:CLUSTER] == b"\xaa" * CLUSTER
    assert got[CLUSTER : 3 * CLUSTER] == bytes(2 * CLUSTER)
    assert got[3 * CLUSTER :] == b"\xaa" * CLUSTER
    assert client.map(0, 4 * CLUSTER)[1] == Extent(CLUSTER, 2 * CLUSTER, State.HOLE | State.ZERO)


@pytest.mark.parametrize("count", [0xFFFFFFFF, 8 * MIB])
def test_trim_and_zero_of_more_than_a_data_request_may_have(serve: Serve, tmp_path: Path, count: int) -> None:
    disk = images.create(tmp_path / "vast.qcow2", 8 << 30)
    with serve(disk) as server, NbdClient(server.nbd_path) as client:
        client.write(0, b"\xaa" * 4096)
        client.write(count - 4096, b"\xaa" * 4096)
        client.zero(0, count)
        assert client.read(0, 4096) + client.read(count - 4096, 4096) == bytes(8192)
        client.write(0, b"\xaa" * 4096)
        client.trim(0, count)
        assert client.read(0, 4096) == bytes(4096)


def test_fua_and_flush_put_data_and_tables_into_the_file(client: NbdClient, disk: Path) -> None:
    client.write(0, b"\x11" * CLUSTER, flags=Flag.FUA)
    client.zero(0, 4096, flags=Flag.FUA)
    look_into(disk, "read -P 0 0 4k", "read -P 0x11 4k 60k")
    client.write(5 * CLUSTER, b"\x22" * CLUSTER)
    client.flush()
    look_into(disk, "read -P 0x22 320k 64k")


def look_into(disk: Path, *commands: str) -> None:
    """Check an image that the server has open, as another process finds it in the file."""
    steps = [word for command in commands for word in ("-c", command)]
    printed = images.run(["qemu-io", "-r", "-U", "-f", "qcow2", *steps, disk])
    assert "Pattern verification failed" not in printed


def test_cache_reads_ahead_and_changes_nothing(client: NbdClient) -> None:
    client.write(4096, b"\x33" * 4096)
    client.cache(0, 8 * MIB)
    client.cache(4000, 3)
    assert client.read(4096, 4096) == b"\x33" * 4096


def test_read_in_one_piece(client: NbdClient) -> None:
    client.write(5000, b"\x44" * 100_000)
    assert client.read(4999, 100_002, flags=Flag.DF) == b"\0" + b"\x44" * 100_000 + b"\0"


def test_many_requests_in_flight(client: NbdClient) -> None:
    block = 4096
    order = random.Random(7).sample(range(512), 512)
    written = [
        client.submit(Command.WRITE, number * block, block, data=number.to_bytes(2, "big") * (block // 2))
        for number in order
    ]
    for cookie in reversed(written):
        client.wait(cookie)
    read = {number: client.submit(Command.READ, number * block, block) for number in order}
    for number, cookie in read.items():
        assert client.wait(cookie).data == number.to_bytes(2, "big") * (block // 2)


def test_data_lands_in_the_overlay_only(serve: Serve, tmp_path: Path) -> None:
    base = images.create(tmp_path / "base.qcow2", MIB)
    images.qemu_io(base, "write -P 0x55 0 1M")
    overlay = images.create(tmp_path / "overlay.qcow2", backing=base)
    before = base.read_bytes()
    with serve(overlay, clean=[overlay, base]) as server, NbdClient(server.nbd_path) as client:
        client.write(70_000, b"\x66" * 10)
        client.zero(200_000, 10)
        client.trim(0, CLUSTER)
        assert client.read(69_999, 12) == b"\x55" + b"\x66" * 10 + b"\x55"
        assert client.read(199_999, 12) == b"\x55" + bytes(10) + b"\x55"
        assert client.read(0, CLUSTER) == bytes(CLUSTER)
    assert base.read_bytes() == before
    images.qemu_io(overlay, "read -P 0x66 70000 10", "read -P 0x55 131072 60000", "read -P 0 0 64k")
