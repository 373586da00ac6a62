"""Images that we make, judged by qemu-img."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbd_backend.block.errors import BlockError
from nbd_backend.block.qcow2.create import Backing, create_qcow2, create_raw
from tests.support import images

MIB = 1 << 20
SIZES = [0, 512, 64 * MIB, (64 << 30) + 512, 8 << 40]


@pytest.mark.parametrize("size", SIZES)
def test_new_image_is_clean_and_has_the_size_asked_for(tmp_path: Path, size: int) -> None:
    path = tmp_path / "new.qcow2"
    create_qcow2(str(path), size)
    images.check(path)
    assert images.info(path)["virtual-size"] == size


@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536, 2 * MIB])
def test_new_image_of_any_cluster_size_is_clean_and_writable_by_qemu(
    tmp_path: Path, cluster_size: int
) -> None:
    path = tmp_path / "new.qcow2"
    create_qcow2(str(path), 256 * MIB, cluster_size=cluster_size)
    images.check(path)
    images.qemu_io(path, "write -P 0x11 3M 1M", "read -P 0x11 3M 1M", "read -P 0 0 3M")
    images.check(path)
    assert images.info(path)["cluster-size"] == cluster_size


def test_new_image_has_the_header_that_qemu_img_makes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create_qcow2(str(ours), 64 * MIB)
    images.create(theirs, 64 * MIB)
    assert images.info(ours)["format-specific"] == images.info(theirs)["format-specific"]
    assert _feature_table(ours) == _feature_table(theirs)


def _feature_table(path: Path) -> set[bytes]:
    data = path.read_bytes()[:4096]
    start = data.index(bytes.fromhex("6803f857"))
    length = int.from_bytes(data[start + 4 : start + 8], "big")
    table = data[start + 8 : start + 8 + length]
    return {table[i : i + 48] for i in range(0, length, 48)}


@pytest.mark.parametrize("backing_format", ["qcow2", "raw"])
def test_overlay_records_backing_name_and_format_and_reads_through(
    tmp_path: Path, backing_format: str
) -> None:
    base = images.create(tmp_path / "base", MIB, fmt=backing_format)
    images.qemu_io(base, "write -P 0x22 0 1M", fmt=backing_format)
    overlay = tmp_path / "overlay.qcow2"
    create_qcow2(str(overlay), MIB, backing=Backing("base", backing_format))
    told = images.info(overlay)
    assert (told["backing-filename"], told["backing-filename-format"]) == ("base", backing_format)
    images.compare(base, overlay, left_fmt=backing_format)
    images.check(overlay)


def test_small_clusters_leave_room_for_a_backing_name(tmp_path: Path) -> None:
    base = images.create(tmp_path / ("b" * 200), MIB, fmt="raw")
    overlay = tmp_path / "overlay.qcow2"
    create_qcow2(str(overlay), MIB, backing=Backing(base.name, "raw"), cluster_size=512)
    images.compare(base, overlay, left_fmt="raw")


def test_size_is_rounded_up_to_sectors(tmp_path: Path) -> None:
    create_qcow2(str(tmp_path / "a"), 1000)
    create_raw(str(tmp_path / "b"), 1000)
    assert images.info(tmp_path / "a")["virtual-size"] == 1024
    assert (tmp_path / "b").stat().st_size == 1024


def test_a_file_that_is_there_loses_its_content(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"x" * MIB)
    create_raw(str(path), 4096)
    assert path.read_bytes() == bytes(4096)


REFUSED = [
    (
        {"size": MIB, "cluster_size": 3 << 10},
        "Cluster size must be a power of two between 512 and 2048k, not 3072",
    ),
    ({"size": MIB, "cluster_size": 256}, "not 256"),
    ({"size": 1 << 50, "cluster_size": 512}, "too many for clusters of 512 bytes"),
]


@pytest.mark.parametrize(("arguments", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_the_format_cannot_hold_is_refused_and_nothing_is_made(
    tmp_path: Path, arguments: dict[str, int], text: str
) -> None:
    path = tmp_path / "new.qcow2"
    with pytest.raises(BlockError) as refused:
        create_qcow2(str(path), arguments["size"], cluster_size=arguments["cluster_size"])
    assert text in refused.value.message
    assert str(path) in refused.value.message
    assert not path.exists()


@pytest.mark.parametrize(("length", "cluster_size"), [(1024, 65536), (400, 512)])
def test_a_backing_name_that_does_not_fit_is_refused(tmp_path: Path, length: int, cluster_size: int) -> None:
    path = tmp_path / "new.qcow2"
    with pytest.raises(BlockError, match="Backing file name too long"):
        create_qcow2(str(path), MIB, backing=Backing("n" * length, "raw"), cluster_size=cluster_size)
    assert not path.exists()


def test_failure_of_the_file_system_names_the_file_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    path = tmp_path / "new.qcow2"
    with pytest.raises(BlockError) as failed:
        create_qcow2(str(path), MIB)
    assert failed.value.message == f"Could not create '{path}': No space left on device"
    assert failed.value.errno == 28
    assert not path.exists()


def test_missing_directory_is_named() -> None:
    with pytest.raises(BlockError, match="Could not create '/nowhere/new': No such file or directory"):
        create_raw("/nowhere/new", 512)
