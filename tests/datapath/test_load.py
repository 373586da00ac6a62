"""Everything at once on one chain: many clients, whose requests overlap or share clusters, and tools."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.datapath.conftest import MIB, Serve
from tests.support import images
from tests.support.nbd_client import Command, NbdClient

SECTOR = 512
DISK = 8 * MIB
FIO = range(SECTOR, 4 * MIB + SECTOR)
QEMU_IO = range(FIO.stop, FIO.stop + MIB)
STORM = range(QEMU_IO.stop + SECTOR, QEMU_IO.stop + SECTOR + MIB // 4)
"""Parts of the disk that do not overlap, though they share clusters; nobody writes to the rest."""
CLIENTS, DEPTH, ROUNDS = 4, 12, 20
LIMIT = 240
"""Seconds that a tool may take."""


@dataclass(frozen=True)
class Change:
    """A write-like request to sectors of STORM; `value` fills what it writes."""

    command: Command
    sectors: range
    value: int = 0


@pytest.fixture(params=[[65536], [4096, 512], [2 * MIB, 65536, 4096], [4096, 65536, 2 * MIB]], ids=str)
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """A chain of these cluster sizes, lowest first, each layer with data and zeroes; the top one is last."""
    layers: list[Path] = []
    for number, cluster_size in enumerate(request.param):
        backing = layers[-1] if layers else None
        options = {"cluster_size": cluster_size}
        layer = images.create(tmp_path / f"{number}.qcow2", DISK, backing=backing, options=options)
        first = number * 300 * 1024
        images.qemu_io(layer, f"write -P {number + 1} {first} 5M", f"write -z {first + MIB} 256k")
        layers.append(layer)
    return layers


def test_requests_of_many_clients_at_once(serve: Serve, chain: list[Path], tmp_path: Path) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    source.write_bytes(random.Random(1).randbytes(DISK))
    with serve(chain[-1], clean=chain) as server:
        uri = server.uri()
        with running(fio(uri)), running(qemu_io(uri)), running(reader(uri)):
            storm(server.nbd_path)
        images.run(["nbdcopy", "--connections=4", "--flush", source, uri], timeout=LIMIT)
        storm(server.nbd_path)
        images.run(["nbdcopy", "--connections=4", uri, target], timeout=LIMIT)
    untouched = [slice(0, STORM.start), slice(STORM.stop, DISK)]
    copied, original = target.read_bytes(), source.read_bytes()
    assert [copied[part] for part in untouched] == [original[part] for part in untouched]


@contextmanager
def running(command: Sequence[str]) -> Iterator[None]:
    """Run a tool beside the block and assert that it succeeds."""
    tool = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield
        printed, _ = tool.communicate(timeout=LIMIT)
        assert tool.returncode == 0, f"{command[0]} exited with {tool.returncode}:\n{printed.decode()}"
    finally:
        tool.kill()
        tool.communicate()


def fio(uri: str) -> list[str]:
    """Verified random reads and writes on four connections; blocks do not fit clusters."""
    part = len(FIO) // 4
    return [
        "fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--thread", "--numjobs=4", "--iodepth=8",
        "--rw=randrw", "--bs=10k", "--fsync=40", "--verify=crc32c", "--verify_fatal=1",
        "--verify_state_save=0", f"--offset={FIO.start}", f"--size={part}", f"--offset_increment={part}",
    ]  # fmt: skip


def qemu_io(uri: str) -> list[str]:
    """Overlapping writes, zeroes and discards in flight together, then what must be found."""
    rng = random.Random(2)
    commands = []
    for _ in range(40):
        count = rng.randrange(1, 200) * SECTOR
        where = f"{QEMU_IO.start + rng.randrange((len(QEMU_IO) - count) // SECTOR) * SECTOR} {count}"
        change = rng.choice(["aio_write -q -P 7", "aio_write -q -z", "aio_write -q -z -u", "discard -q"])
        commands.append(f"{change} {where}")
    whole = f"{QEMU_IO.start} {len(QEMU_IO)}"
    commands += ["aio_flush", f"write -q -P 9 {whole}", "flush", f"read -q -P 9 {whole}"]
    return ["qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri]


def reader(uri: str) -> list[str]:
    """Copies the whole disk to nowhere."""
    return ["nbdcopy", "--connections=4", "--requests=16", uri, "null:"]


def storm(socket: Path) -> None:
    """Rounds of overlapping requests in flight together; what the disk holds after each must be explained."""
    rng = random.Random(3)
    with ExitStack() as stack:
        clients = [stack.enter_context(NbdClient(socket)) for _ in range(CLIENTS)]
        for _ in range(ROUNDS):
            clients[0].trim(STORM.start, len(STORM))  # so that each round allocates
            before = clients[0].read(STORM.start, len(STORM))
            changes = [random_change(rng, 1 + number) for number in range(CLIENTS * DEPTH)]
            batches = [changes[number::CLIENTS] for number in range(CLIENTS)]
            sent = [
                (client, submit(client, rng, change))
                for batch in zip(*batches, strict=True)
                for client, change in zip(clients, batch, strict=True)
            ]
            for client, cookies in sent:
                for cookie in cookies:
                    client.wait(cookie)
            after = clients[0].read(STORM.start, len(STORM))
            assert_explained(before, after, changes)


def random_change(rng: random.Random, value: int) -> Change:
    """A request to up to 64 sectors."""
    first = rng.randrange(len(STORM) // SECTOR)
    sectors = range(first, min(first + rng.randint(1, 64), len(STORM) // SECTOR))
    command = rng.choice([Command.WRITE, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM])
    return Change(command, sectors, value if command == Command.WRITE else 0)


def submit(client: NbdClient, rng: random.Random, change: Change) -> list[int]:
    """Send a change and another request that changes nothing; their cookies."""
    offset, count = STORM.start + change.sectors.start * SECTOR, len(change.sectors) * SECTOR
    data = bytes([change.value]) * count if change.command == Command.WRITE else b""
    cookies = [client.submit(change.command, offset, count, data=data)]
    beside = rng.choice([Command.READ, Command.BLOCK_STATUS, Command.CACHE, Command.FLUSH])
    if beside == Command.FLUSH:
        return [*cookies, client.submit(beside, 0, 0)]
    return [*cookies, client.submit(beside, STORM.start, len(STORM))]


def assert_explained(before: bytes, after: bytes, changes: Sequence[Change]) -> None:
    """Assert that each sector is as one of the changes to it left it, or as before if none wrote it."""
    covering: list[list[Change]] = [[] for _ in range(len(STORM) // SECTOR)]
    for change in changes:
        for sector in change.sectors:
            covering[sector].append(change)
    for sector, requests in enumerate(covering):
        here = slice(sector * SECTOR, (sector + 1) * SECTOR)
        allowed = {bytes([change.value]) * SECTOR for change in requests}
        if all(change.command == Command.TRIM for change in requests):
            allowed.add(before[here])
        assert after[here] in allowed, f"sector {sector}: {after[here][:8].hex()}… after {requests}"
