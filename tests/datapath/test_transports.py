"""Listeners, connections and real clients: unix and TCP, several at once, libnbd's and QEMU's tools."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.datapath.conftest import MIB, Serve
from tests.support import images
from tests.support.nbd_client import Command, NbdClient
from tests.support.server import free_port


def test_tcp_and_unix_show_the_same_disk(serve: Serve, disk: Path) -> None:
    port = free_port()
    with (
        serve(disk, tcp_port=port) as server,
        NbdClient(server.nbd_path) as local,
        NbdClient(("127.0.0.1", port), "sda") as remote,
    ):
        local.write(12345, b"from here")
        local.flush()
        assert remote.read(12345, 9) == b"from here"


def test_a_flush_on_one_connection_covers_what_others_have_written(serve: Serve, disk: Path) -> None:
    with serve(disk) as server:
        clients = [NbdClient(server.nbd_path) for _ in range(8)]
        for number, client in enumerate(clients):
            client.write(number * 100_000, bytes([number + 1]) * 100_000)
        clients[0].flush()
        server.kill()
        for client in clients:
            client.abandon()
        server.start()
        with NbdClient(server.nbd_path) as reader:
            for number in range(8):
                assert reader.read(number * 100_000, 100_000) == bytes([number + 1]) * 100_000


def test_images_do_not_touch_one_another(serve: Serve, tmp_path: Path) -> None:
    disks = [images.create(tmp_path / f"{number}.qcow2", MIB) for number in range(6)]
    with serve(*disks) as server:
        for number in range(6):
            images.qemu_io(server.uri(f"sd{chr(97 + number)}"), f"write -P {number + 1} 0 1M", fmt="raw")
    for number, disk in enumerate(disks):
        images.qemu_io(disk, f"read -P {number + 1} 0 1M", read_only=True)


def test_clients_in_parallel_read_what_they_wrote(serve: Serve, disk: Path) -> None:
    failures: list[BaseException] = []

    def work(path: Path, number: int) -> None:
        rng = random.Random(number)
        try:
            with NbdClient(path) as client:
                for _ in range(60):
                    count = rng.randint(1, 40_000)
                    offset = number * MIB + rng.randrange(MIB - count)
                    data = rng.randbytes(count)
                    client.write(offset, data)
                    assert client.read(offset, count) == data
        except BaseException as error:
            failures.append(error)

    with serve(disk) as server:
        workers = [threading.Thread(target=work, args=(server.nbd_path, number)) for number in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures


def test_a_client_that_dies_leaves_the_others_alone(serve: Serve, disk: Path) -> None:
    with serve(disk) as server, NbdClient(server.nbd_path) as survivor:
        for _ in range(20):
            dying = NbdClient(server.nbd_path)
            # One request: nbdkit before 1.33.10 aborts when it finds two replies that it cannot send.
            dying.submit(Command.READ, 0, 4 * MIB)
            dying.abandon()
        survivor.write(0, b"alive")
        assert survivor.read(0, 5) == b"alive"


def test_nbdcopy_both_ways(serve: Serve, tmp_path: Path) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    data = bytearray(random.Random(3).randbytes(6 * MIB))
    data[MIB : 3 * MIB] = bytes(2 * MIB)
    source.write_bytes(data)
    disk = images.create(tmp_path / "disk.qcow2", 6 * MIB)
    with serve(disk) as server:
        images.run(["nbdcopy", "--flush", source, server.uri()])
        images.run(["nbdcopy", "--connections=4", server.uri(), target])
        assert target.read_bytes() == data
    images.compare(disk, source, right_fmt="raw")
    assert images.info(disk)["actual-size"] < 5 * MIB


def test_qemu_img_convert_both_ways(serve: Serve, tmp_path: Path) -> None:
    source = images.create(tmp_path / "source.qcow2", 6 * MIB)
    images.qemu_io(source, "write -P 1 0 1M", "write -P 2 3M 123k", "write -z 5M 1M")
    disk = images.create(tmp_path / "disk.qcow2", 6 * MIB)
    with serve(disk) as server:
        images.run(["qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", source, server.uri()])
        copy = images.convert(server.uri(), tmp_path / "copy.qcow2", fmt="raw", target_fmt="qcow2")
        images.compare(source, server.uri(), right_fmt="raw")
    images.compare(source, copy)
    images.compare(source, disk)


def test_qemu_io_over_nbd(serve: Serve, disk: Path) -> None:
    with serve(disk) as server:
        images.qemu_io(
            server.uri(),
            *("write -P 7 1 100k", "write -f -P 8 200k 4k", "write -z 64k 4k", "write -z -u 0 64k"),
            *("discard 1M 1M", "flush"),
            *("read -P 0 0 68k", "read -P 7 68k 32k", "read -P 8 200k 4k"),
            fmt="raw",
        )


@pytest.mark.parametrize("stop", ["idle client", "client in the middle of requests"])
def test_sigterm_ends_the_server_whatever_clients_do(serve: Serve, disk: Path, stop: str) -> None:
    with serve(disk) as server:
        client = NbdClient(server.nbd_path)
        client.write(0, b"\x11" * MIB)
        if stop != "idle client":
            for number in range(64):
                client.submit(Command.WRITE, number * 4096, 4096, data=b"\x22" * 4096)
        server.stop()
        client.abandon()
        server.start()
        with NbdClient(server.nbd_path) as again:
            assert set(again.read(0, MIB)) <= {0x11, 0x22}
