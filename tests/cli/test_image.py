"""`image info` and `image map` against qemu-img on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbd_backend.cli import main
from tests.support import images

Chain = Callable[[Path], tuple[Path, str]]


def standard(directory: Path) -> tuple[Path, str]:
    """Data, zeroes with and without space of their own, and nothing, in one layer."""
    path = images.create(directory / "top.qcow2", 4 << 20)
    images.qemu_io(path, "write -P 1 0 192k", "write -P 2 1M 64k", "write -z 64k 64k", "write -zu 128k 64k")
    return path, "qcow2"


def three_layers(directory: Path) -> tuple[Path, str]:
    """Each layer covers a part of those below."""
    base = images.create(directory / "base.qcow2", 4 << 20)
    images.qemu_io(base, "write -P 1 0 2M")
    middle = images.create(directory / "middle.qcow2", backing=base)
    images.qemu_io(middle, "write -P 2 512k 1M", "write -z 1M 128k")
    top = images.create(directory / "top.qcow2", backing=middle)
    images.qemu_io(top, "write -P 3 768k 64k", "write -z 0 64k", "discard 768k 64k")
    return top, "qcow2"


def short_base(directory: Path) -> tuple[Path, str]:
    """What lies beyond the end of a shorter backing file reads as zeroes there."""
    base = images.create(directory / "base.qcow2", 1 << 20)
    images.qemu_io(base, "write -P 1 960k 64k")
    return images.create(directory / "top.qcow2", 3 << 20, backing=base), "qcow2"


def long_base(directory: Path) -> tuple[Path, str]:
    """A longer backing file is cut off."""
    base = images.create(directory / "base.qcow2", 3 << 20)
    images.qemu_io(base, "write -P 1 0 3M")
    return images.create(directory / "top.qcow2", 1 << 20, backing=base), "qcow2"


def raw_base(directory: Path) -> tuple[Path, str]:
    """Holes of the file are zeroes that belong to the raw layer."""
    base = images.create(directory / "base.raw", 4 << 20, fmt="raw")
    images.qemu_io(base, "write -P 1 1M 1M", fmt="raw")
    top = images.create(directory / "top.qcow2", backing=base, backing_fmt="raw")
    images.qemu_io(top, "write -P 2 1536k 64k")
    return top, "qcow2"


def raw_alone(directory: Path) -> tuple[Path, str]:
    """A sparse raw file."""
    path = images.create(directory / "disk.raw", 4 << 20, fmt="raw")
    images.qemu_io(path, "write -P 1 1M 64k", "write -P 1 3M 64k", fmt="raw")
    return path, "raw"


def compressed(directory: Path) -> tuple[Path, str]:
    """Compressed clusters have no place that could be read as it is."""
    path = images.create(directory / "top.qcow2", 2 << 20)
    images.qemu_io(path, "write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 128k 64k")
    return path, "qcow2"


def small_clusters(directory: Path) -> tuple[Path, str]:
    """The smallest clusters there are, in the older version."""
    path = images.create(directory / "top.qcow2", 1 << 20, options={"cluster_size": 512, "compat": "0.10"})
    images.qemu_io(path, "write -P 1 0 1k", "write -P 1 100k 512")
    return path, "qcow2"


def large_clusters(directory: Path) -> tuple[Path, str]:
    """The largest clusters there are."""
    path = images.create(directory / "top.qcow2", 9 << 20, options={"cluster_size": "2M"})
    images.qemu_io(path, "write -P 1 2M 1M", "write -P 2 8M 1M")
    return path, "qcow2"


def empty(directory: Path) -> tuple[Path, str]:
    """A disk of no bytes."""
    return images.create(directory / "top.qcow2", 0), "qcow2"


CHAINS: list[Chain] = [
    standard, three_layers, short_base, long_base, raw_base,
    raw_alone, compressed, small_clusters, large_clusters, empty,
]  # fmt: skip


def json_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    """What a command prints with --json."""
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("make", CHAINS, ids=lambda make: make.__name__)
def test_map_is_qemu_imgs(make: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, image_format = make(tmp_path)
    ours = json_of(capsys, "image", "map", "--format", image_format, path)
    theirs = images.extents(path, fmt=image_format)
    known = set(theirs[0]) | {"offset"} if theirs else set()
    assert [{key: value for key, value in run.items() if key in known} for run in ours] == theirs


@pytest.mark.parametrize("make", CHAINS, ids=lambda make: make.__name__)
def test_info_is_qemu_imgs(make: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, image_format = make(tmp_path)
    ours = json_of(capsys, "image", "info", "--format", image_format, path)
    theirs = images.info(path, fmt=image_format)
    theirs.pop("children", None)  # newer releases tell the nodes below, too
    assert ours == theirs


def test_backing_chain_lists_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = three_layers(tmp_path)
    layers = json_of(capsys, "image", "info", "--backing-chain", path)
    assert [Path(layer["filename"]).name for layer in layers] == ["top.qcow2", "middle.qcow2", "base.qcow2"]


def test_info_for_people_is_qemu_imgs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = three_layers(tmp_path)
    assert main(["image", "info", str(path)]) == 0
    theirs = images.run(["qemu-img", "info", "-f", "qcow2", path]).splitlines()
    assert set(capsys.readouterr().out.splitlines()) == set(theirs)


def test_map_for_people_shows_where_the_data_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = raw_base(tmp_path)
    assert main(["image", "map", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["Offset", "Length", "Mapped", "to", "File"]
    assert ["0x100000", "0x80000", "0x100000", f"{tmp_path}/base.raw"] in lines
    assert ["0x180000", "0x10000", "0x50000", str(path)] in lines


def test_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "info", f"{tmp_path}/nope"]) == 1
    error = capsys.readouterr().err
    assert error == f"nbd-backend: image: Could not open '{tmp_path}/nope': No such file or directory\n"


def test_raw_file_is_not_taken_for_qcow2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = raw_alone(tmp_path)
    assert main(["image", "map", str(path)]) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1


def test_chain_is_drawn_as_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = three_layers(tmp_path)
    assert main(["chain", str(path)]) == 0
    drawn = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert drawn[0] == str(path)
    assert len(drawn) == 3
