"""What a client learns of the exports before its first request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.datapath.conftest import MIB, Serve
from tests.support import images
from tests.support.nbd_client import (
    BASE_ALLOCATION,
    ListedExport,
    NbdClient,
    NbdError,
    TransmissionFlag,
    list_exports,
)

WRITABLE = (
    TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_DF
    | TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_CACHE | TransmissionFlag.SEND_FAST_ZERO
)  # fmt: skip


def nbdinfo(uri: str, *flags: str) -> list[dict[str, Any]]:
    """The exports as libnbd's nbdinfo sees them."""
    exports: list[dict[str, Any]] = json.loads(images.run(["nbdinfo", "--json", *flags, uri]))["exports"]
    return exports


def test_export_info_as_libnbd_sees_it(serve: Serve, disk: Path) -> None:
    with serve(disk) as server:
        [export] = nbdinfo(server.uri())
    assert export["export-size"] == 8 * MIB
    assert BASE_ALLOCATION in export["contexts"]
    assert {name: value for name, value in export.items() if name.startswith(("can_", "is_"))} == {
        "is_rotational": False, "is_read_only": False,
        "can_cache": True, "can_df": True, "can_fast_zero": True, "can_flush": True, "can_fua": True,
        "can_multi_conn": True, "can_trim": True, "can_zero": True,
    }  # fmt: skip


def test_block_sizes_allow_any_byte_range(client: NbdClient) -> None:
    assert client.info.flags == WRITABLE
    assert client.info.block_sizes is not None
    minimum, preferred, maximum = client.info.block_sizes
    assert minimum == 1
    assert 4096 <= preferred <= 65536
    assert maximum >= 32 * MIB


def test_read_only_server_says_so(serve: Serve, disk: Path) -> None:
    with serve(disk, options=["--read-only"]) as server, NbdClient(server.nbd_path) as client:
        assert client.info.flags & TransmissionFlag.READ_ONLY
        assert not client.info.flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)
        assert client.info.flags & TransmissionFlag.CAN_MULTI_CONN


def test_images_are_exports_in_order_the_first_is_the_default(serve: Serve, tmp_path: Path) -> None:
    first = images.create(tmp_path / "a.qcow2", 1 * MIB)
    second = images.create(tmp_path / "b.qcow2", 2 * MIB)
    third = images.create(tmp_path / "c.qcow2", 3 * MIB)
    with serve(first, f"data={second}", third) as server:
        assert [export.name for export in list_exports(server.nbd_path)] == ["sda", "data", "sdc"]
        sizes = {export["export-name"]: export["export-size"] for export in nbdinfo(server.uri(), "--list")}
        assert sizes == {"sda": 1 * MIB, "data": 2 * MIB, "sdc": 3 * MIB}
        for name, size in {"": 1, "sda": 1, "data": 2, "sdc": 3}.items():
            with NbdClient(server.nbd_path, name) as client:
                assert client.size == size * MIB


def test_description_of_an_export_is_listed(serve: Serve, disk: Path) -> None:
    with serve(disk) as server, server.qmp() as qmp:
        qmp.cmd(
            "block-export-add",
            {"type": "nbd", "id": "e", "node-name": "sda", "name": "copy", "description": "für später"},
        )
        assert ListedExport("copy", "für später") in list_exports(server.nbd_path)
        with NbdClient(server.nbd_path, "copy") as client:
            assert client.info.description == "für später"
            assert client.info.flags & TransmissionFlag.READ_ONLY


def test_unknown_export_is_refused_and_the_server_goes_on(serve: Serve, disk: Path) -> None:
    with serve(disk) as server:
        with pytest.raises(NbdError) as refused:
            NbdClient(server.nbd_path, "nothing")
        assert refused.value.name == "ERR_UNKNOWN"
        with NbdClient(server.nbd_path) as client:
            assert client.read(0, 512) == bytes(512)
        assert "there is no export 'nothing'; the exports are 'sda'" in server.log()


def test_client_without_structured_replies(serve: Serve, disk: Path) -> None:
    with serve(disk) as server, NbdClient(server.nbd_path, structured=False) as client:
        client.write(1000, b"plain")
        assert client.read(999, 7) == b"\0plain\0"
        assert client.contexts == {}


def test_unknown_meta_context_is_left_out(serve: Serve, disk: Path) -> None:
    with serve(disk) as server:
        with NbdClient(server.nbd_path, contexts=["x-unknown:context", BASE_ALLOCATION]) as client:
            assert list(client.contexts.values()) == [BASE_ALLOCATION]
        with NbdClient(server.nbd_path, contexts=["x-unknown:context"]) as client:
            assert client.contexts == {}


def test_disk_of_odd_size_and_raw_format(serve: Serve, tmp_path: Path) -> None:
    raw = tmp_path / "odd.raw"
    raw.write_bytes(bytes(range(256)) * 10)
    with serve(raw, options=["--format", "raw"]) as server, NbdClient(server.nbd_path) as client:
        assert client.size == 2560
        assert client.read(2550, 10) == bytes(range(246, 256))
