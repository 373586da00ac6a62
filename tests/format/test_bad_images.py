"""Damaged and hostile images: refused, or unreadable where they are damaged, with a message that says why.

Every message names the file, the field and the value. Nothing crashes, hangs, or writes to the image; only a
writable image of version 3 whose tables turn out to be damaged gets the corrupt bit that the format has.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.format import damage
from tests.format.damage import CLUSTER, COMPRESSED, COPIED, MIB, Image
from tests.support import images
from tests.support.nbd_client import NbdClient, NbdError
from tests.support.server import NbdBackend, executable

LIMIT = 20
"""Seconds that a refusal may take."""

Damage = Callable[[Image], object]

HEADER: dict[str, tuple[Damage, Sequence[str]]] = {
    "magic": (
        lambda i: i.put(damage.MAGIC, 0x4B444D56, 4),
        ["not in qcow2 format", "0x4b444d56", "--format raw"],
    ),
    "version": (lambda i: i.put(damage.VERSION, 4, 4), ["Unsupported qcow2 version 4"]),
    "cluster_bits too small": (lambda i: i.put(damage.CLUSTER_BITS, 8, 4), ["cluster", "2^8"]),
    "cluster_bits too large": (lambda i: i.put(damage.CLUSTER_BITS, 22, 4), ["cluster", "2^22"]),
    "cluster_bits absurd": (lambda i: i.put(damage.CLUSTER_BITS, 0xFFFFFFFF, 4), ["cluster", "4294967295"]),
    "size not of sectors": (lambda i: i.put(damage.SIZE, 4 * MIB + 1), ["size", "4194305", "512"]),
    "size beyond the L1 table": (lambda i: i.put(damage.SIZE, 1 << 40), ["l1_size", "L1 table is too small"]),
    "size absurd": (lambda i: i.put(damage.SIZE, (1 << 64) - 512), ["size", str((1 << 64) - 512)]),
    "crypt_method AES": (lambda i: i.put(damage.CRYPT, 1, 4), ["crypt"]),
    "crypt_method unknown": (lambda i: i.put(damage.CRYPT, 3, 4), ["encryption method 3"]),
    "l1_size too large": (lambda i: i.put(damage.L1_SIZE, 1 << 31, 4), ["l1_size", str(1 << 31)]),
    "l1_size zero": (lambda i: i.put(damage.L1_SIZE, 0, 4), ["l1_size", "0"]),
    "l1_table_offset unaligned": (
        lambda i: i.put(damage.L1_OFFSET, i.l1 + 512),
        ["l1_table_offset", "0x30200"],
    ),
    "l1_table_offset past the end": (
        lambda i: i.put(damage.L1_OFFSET, 1 << 40),
        ["l1_table_offset", hex(1 << 40)],
    ),
    "l1_table_offset at the header": (lambda i: i.put(damage.L1_OFFSET, 0), ["l1_table_offset", "0"]),
    "refcount_table_offset unaligned": (
        lambda i: i.put(damage.REFTABLE_OFFSET, CLUSTER + 8),
        ["refcount_table_offset", hex(CLUSTER + 8)],
    ),
    "refcount_table_offset past the end": (
        lambda i: i.put(damage.REFTABLE_OFFSET, 1 << 50),
        ["refcount_table_offset", hex(1 << 50)],
    ),
    "refcount_table_clusters zero": (
        lambda i: i.put(damage.REFTABLE_CLUSTERS, 0, 4),
        ["refcount_table_clusters", "0"],
    ),
    "refcount_table_clusters too large": (
        lambda i: i.put(damage.REFTABLE_CLUSTERS, 1 << 30, 4),
        ["refcount_table_clusters", str(1 << 30)],
    ),
    "nb_snapshots too large": (lambda i: i.put(damage.SNAPSHOTS, 65537, 4), ["nb_snapshots", "65537"]),
    "snapshots_offset unaligned": (
        lambda i: i.put(damage.SNAPSHOTS, 1, 4).put(damage.SNAPSHOTS_OFFSET, 513),
        ["snapshots_offset", "0x201"],
    ),
    "backing_file_offset past the first cluster": (
        lambda i: i.put(damage.BACKING_OFFSET, CLUSTER + 1),
        ["backing_file_offset", str(CLUSTER + 1)],
    ),
    "backing_file_size too large": (
        lambda i: i.put(damage.BACKING_OFFSET, 1024).put(damage.BACKING_SIZE, 1024, 4),
        ["backing_file_size", "1024"],
    ),
    "unknown incompatible feature": (
        lambda i: i.put(damage.INCOMPATIBLE, 1 << 45),
        ["nsupported", "feature"],
    ),
    "compression type without its bit": (
        lambda i: i.put(damage.COMPRESSION, 1, 1),
        ["compression_type", "1"],
    ),
    "compression type unknown": (
        lambda i: i.put(damage.COMPRESSION, 9, 1).put(damage.INCOMPATIBLE, 8),
        ["compression type: 9"],
    ),
    "refcount_order too large": (lambda i: i.put(damage.REFCOUNT_ORDER, 7, 4), ["refcount_order", "7"]),
    "header_length too short": (lambda i: i.put(damage.HEADER_LENGTH, 96, 4), ["header_length", "96"]),
    "header_length no multiple of 8": (
        lambda i: i.put(damage.HEADER_LENGTH, 108, 4),
        ["header_length", "108"],
    ),
    "header_length past the cluster": (
        lambda i: i.put(damage.HEADER_LENGTH, 1 << 20, 4),
        ["header_length", "1048576"],
    ),
    "extension too long": (lambda i: i.put(112 + 4, 1 << 30, 4), ["extension", str(1 << 30)]),
    "file cut inside the header": (lambda i: i.truncate(60), ["file size", "60"]),
    "file cut inside the version 3 header": (lambda i: i.truncate(100), ["file size", "100"]),
    "file cut before the tables": (lambda i: i.truncate(CLUSTER), ["end of the file", str(CLUSTER)]),
    "empty file": (lambda i: i.truncate(0), ["magic"]),
}

ENTRIES: dict[str, tuple[Damage, int, Sequence[str]]] = {
    "L2 entry unaligned": (
        lambda i: i.put(i.l2_entry(3), COPIED | 0x50200), 3, ["L2", "0x8000000000050200"],
    ),
    "L2 entry past the end": (
        lambda i: i.put(i.l2_entry(3), COPIED | 1 << 40), 3, ["L2", hex(COPIED | 1 << 40)],
    ),
    "L2 entry with reserved bits": (
        lambda i: i.put(i.l2_entry(3), i.get(i.l2_entry(3)) | 1 << 57), 3, ["L2"],
    ),
    "L2 entry without a place but exclusive": (
        lambda i: i.put(i.l2_entry(3), COPIED), 3, ["L2", hex(COPIED)],
    ),
    "compressed cluster past the end": (
        lambda i: i.put(i.l2_entry(40), COMPRESSED | 1 << 40), 40, ["compressed"],
    ),
    "compressed cluster marked exclusive": (
        lambda i: i.put(i.l2_entry(40), i.get(i.l2_entry(40)) | COPIED), 40, ["compressed"],
    ),
    "compressed data damaged": (
        lambda i: i.put(i.get(i.l2_entry(40)) & ((1 << 54) - 1), (1 << 64) - 1), 40, ["compressed"],
    ),
}  # fmt: skip

TABLES: dict[str, tuple[Damage, Sequence[str]]] = {
    "L1 entry unaligned": (lambda i: i.put(i.l1, COPIED | 0x40200), ["L1", "0", "0x8000000000040200"]),
    "L1 entry past the end": (lambda i: i.put(i.l1, COPIED | 1 << 40), ["L1", "0", hex(COPIED | 1 << 40)]),
    "L1 entry with reserved bits": (lambda i: i.put(i.l1, i.get(i.l1) | 1 << 60), ["L1", "0"]),
    "refcount table entry unaligned": (
        lambda i: i.put(i.get(damage.REFTABLE_OFFSET), 0x20200), ["efcount table entry 0", "0x20200"],
    ),
    "refcount table entry past the end": (
        lambda i: i.put(i.get(damage.REFTABLE_OFFSET), 1 << 50), ["efcount table entry 0", hex(1 << 50)],
    ),
}  # fmt: skip


def refusal(*words: str | Path) -> str:
    """What an nbd-backend command that must fail says on standard error: one line, and no traceback."""
    done = subprocess.run(
        [str(executable()), *map(str, words)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("nbdkit: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def serve_refusal(directory: Path, image: Path, *options: str) -> str:
    """The same of `serve`, which must leave no socket behind."""
    nbd, qmp = directory / "nbd.sock", directory / "qmp.sock"
    message = refusal("serve", image, "--nbd", f"unix:{nbd}", "--qmp", f"unix:{qmp}", *options)
    assert not nbd.exists()
    assert not qmp.exists()
    return message


def says(message: str, image: Path, words: Sequence[str]) -> None:
    """Assert that the message names the file and all the words, in whatever case."""
    missing = [word for word in (str(image), *words) if word.lower() not in message.lower()]
    assert not missing, f"{missing} not in: {message}"


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """An image to be damaged."""
    return damage.healthy(tmp_path / "bad.qcow2")


@pytest.mark.parametrize("case", HEADER)
def test_header_field_out_of_range_is_refused(image: Image, case: str) -> None:
    break_it, words = HEADER[case]
    break_it(image)
    before = image.path.read_bytes()
    says(refusal("image", "info", image.path), image.path, words)
    assert image.path.read_bytes() == before


@pytest.mark.parametrize("case", ["magic", "l1_table_offset past the end", "file cut before the tables"])
def test_serve_refuses_the_same_headers(image: Image, tmp_path: Path, case: str) -> None:
    break_it, words = HEADER[case]
    break_it(image)
    before = image.path.read_bytes()
    says(serve_refusal(tmp_path, image.path), image.path, words)
    assert image.path.read_bytes() == before


@pytest.mark.parametrize("case", TABLES)
def test_damaged_table_is_refused_at_start(image: Image, tmp_path: Path, case: str) -> None:
    break_it, words = TABLES[case]
    break_it(image)
    before = image.path.read_bytes()
    says(serve_refusal(tmp_path, image.path), image.path, words)
    assert image.path.read_bytes() == before


def expect_io_error(client: NbdClient, cluster: int) -> None:
    """The cluster is unreadable, its neighbours are not."""
    for offset, count in ((cluster * CLUSTER, CLUSTER), (cluster * CLUSTER + 100, 1)):
        with pytest.raises(NbdError) as error:
            client.read(offset, count)
        assert error.value.name == "EIO"
    assert client.read((cluster - 2) * CLUSTER, CLUSTER) == (b"\x11" if cluster < 32 else b"\0") * CLUSTER
    assert client.read(MIB, CLUSTER) == b"\x11" * CLUSTER


@pytest.mark.parametrize("case", ENTRIES)
def test_damaged_entry_of_a_read_only_image_changes_nothing(image: Image, tmp_path: Path, case: str) -> None:
    break_it, cluster, words = ENTRIES[case]
    break_it(image)
    before = image.path.read_bytes()
    with (
        NbdBackend(image.path, directory=tmp_path, options=["--read-only"]) as server,
        server.qmp() as qmp,
        NbdClient(server.nbd_path) as client,
    ):
        expect_io_error(client, cluster)
        corrupted = corruption(qmp.wait_event("BLOCK_IMAGE_CORRUPTED"))
        assert corrupted["node-name"] == "sda"
        says(server.log(), image.path, words)
    assert image.path.read_bytes() == before


def corruption(event: dict[str, Any]) -> dict[str, Any]:
    """The event's data."""
    data: dict[str, Any] = event["data"]
    return data


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("case", ENTRIES)
def test_damaged_entry_stops_writes_and_marks_the_image(tmp_path: Path, case: str, compat: str) -> None:
    image = damage.healthy(tmp_path / "bad.qcow2", compat=compat)
    break_it, cluster, _ = ENTRIES[case]
    break_it(image)
    before = image.path.read_bytes()
    with NbdBackend(image.path, directory=tmp_path) as server, NbdClient(server.nbd_path) as client:
        expect_io_error(client, cluster)
        for offset in (0, 3 * MIB, cluster * CLUSTER):
            with pytest.raises(NbdError) as error:
                client.write(offset, b"x")
            assert error.value.name == "EIO"
        assert client.read(0, CLUSTER) == b"\x11" * CLUSTER
    expected = bytearray(before)
    if compat == "1.1":
        expected[damage.INCOMPATIBLE + 7] |= damage.CORRUPT_BIT
    assert image.path.read_bytes() == expected


def test_image_marked_corrupt_is_served_read_only_alone(image: Image, tmp_path: Path) -> None:
    image.put(damage.INCOMPATIBLE, damage.CORRUPT_BIT)
    says(serve_refusal(tmp_path, image.path), image.path, ["corrupt", "read-only"])
    with (
        NbdBackend(image.path, directory=tmp_path, options=["--read-only"]) as server,
        NbdClient(server.nbd_path) as client,
    ):
        assert client.read(0, CLUSTER) == b"\x11" * CLUSTER


def test_file_cut_inside_the_data(image: Image, tmp_path: Path) -> None:
    last = max(image.get(image.l2_entry(cluster)) & 0x00FFFFFFFFFFFE00 for cluster in range(32))
    cluster = next(c for c in range(32) if image.get(image.l2_entry(c)) & 0x00FFFFFFFFFFFE00 == last)
    image.truncate(last)
    with (
        NbdBackend(image.path, directory=tmp_path, options=["--read-only"]) as server,
        NbdClient(server.nbd_path) as client,
    ):
        with pytest.raises(NbdError) as error:
            client.read(cluster * CLUSTER, 512)
        assert error.value.name == "EIO"
        assert client.read(0, CLUSTER) == b"\x11" * CLUSTER


def test_chain_that_loops_is_refused(tmp_path: Path) -> None:
    first = images.create(tmp_path / "first.qcow2", MIB)
    second = images.create(tmp_path / "second.qcow2", backing=first)
    images.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", second, "-F", "qcow2", first])
    before = first.read_bytes(), second.read_bytes()
    for image in (first, second):
        message = serve_refusal(tmp_path, image)
        assert "loop" in message
        assert str(first) in message or str(second) in message
    assert (first.read_bytes(), second.read_bytes()) == before


def test_image_that_backs_itself_is_refused(tmp_path: Path) -> None:
    image = images.create(tmp_path / "own.qcow2", MIB)
    images.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "own.qcow2", "-F", "qcow2", image])
    assert "loop" in serve_refusal(tmp_path, image)


def test_missing_backing_file_is_named_with_its_overlay(tmp_path: Path) -> None:
    base = images.create(tmp_path / "base.qcow2", MIB)
    overlay = images.create(tmp_path / "overlay.qcow2", backing=base)
    base.unlink()
    before = overlay.read_bytes()
    message = serve_refusal(tmp_path, overlay)
    says(message, overlay, ["backing", str(base), "No such file"])
    assert overlay.read_bytes() == before


def test_backing_file_without_a_recorded_format_is_never_probed(tmp_path: Path) -> None:
    base = images.create(tmp_path / "base.qcow2", MIB)
    overlay = images.create(tmp_path / "overlay.qcow2", backing=base)
    images.run(["qemu-img", "amend", "-f", "qcow2", "-o", "compat=1.1", overlay])
    image = Image(overlay)
    kind = next(at for at in range(104, 1024, 8) if image.get(at, 4) == 0xE2792ACA)
    image.put(kind, 0x12345678, 4)
    says(serve_refusal(tmp_path, overlay), overlay, ["format", str(base)])


def test_damaged_backing_layer_is_named_not_its_overlay(tmp_path: Path) -> None:
    base = damage.healthy(tmp_path / "base.qcow2")
    overlay = images.create(tmp_path / "overlay.qcow2", backing=base.path)
    base.put(base.l1, COPIED | 0x40200)
    says(serve_refusal(tmp_path, overlay), base.path, ["L1", "0x8000000000040200"])
