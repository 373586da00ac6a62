"""The commands about nodes and exports, on a server, with the texts that clients match on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.nbd_client import NbdClient, NbdError, list_exports
from tests.support.qmp import QmpClient, QmpError
from tests.support.server import NbdBackend

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """An overlay over a base."""
    base = images.create(tmp_path / "base.qcow2", 4 * MIB)
    return images.create(tmp_path / "top.qcow2", backing=base)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdBackend]:
    """A server without images."""
    with NbdBackend(directory=tmp_path) as running:
        yield running


@pytest.fixture
def qmp(server: NbdBackend) -> Iterator[QmpClient]:
    """A monitor of it."""
    with server.qmp() as client:
        yield client


def node(path: Path, name: str = "top") -> dict[str, Any]:
    """blockdev-add's arguments for a qcow2 image."""
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}}


def export(name: str = "top", **more: Any) -> dict[str, Any]:
    """block-export-add's arguments."""
    return {"type": "nbd", "id": "e", "node-name": name, **more}


def refused(qmp: QmpClient, command: str, arguments: dict[str, Any]) -> str:
    """The text of the GenericError that a command is answered with."""
    with pytest.raises(QmpError) as error:
        qmp.cmd(command, arguments)
    assert error.value.kind == "GenericError"
    return error.value.desc


def test_node_is_added_exported_and_removed(qmp: QmpClient, server: NbdBackend, chain: Path) -> None:
    qmp.cmd("blockdev-add", node(chain))
    qmp.cmd("block-export-add", export(name="top", writable=True, description="a disk"))
    assert [(one.name, one.description) for one in list_exports(server.nbd_path)] == [("top", "a disk")]
    with NbdClient(server.nbd_path, "top") as client:
        client.write(0, b"n" * 512)
    qmp.cmd(
        "block-export-del", {"id": "e", "mode": "hard"}
    )  # that the client has gone may not have been noticed
    assert qmp.wait_event("BLOCK_EXPORT_DELETED")["data"] == {"id": "e"}
    qmp.cmd("blockdev-del", {"node-name": "top"})
    assert qmp.cmd("query-named-block-nodes") == []
    images.check(chain)
    images.qemu_io(chain, "read -P 0x6e 0 512")


def test_nodes_are_told_as_qemu_tells_them(qmp: QmpClient, chain: Path) -> None:
    qmp.cmd("blockdev-add", node(chain))
    for flat in (False, True):
        ours = by_file(qmp.cmd("query-named-block-nodes", {"flat": flat}))
        theirs = by_file(ask_qemu(chain, flat=flat))
        assert ours.keys() == theirs.keys()
        for key, entry in theirs.items():
            different = {name for name in entry if ours[key].get(name) != entry[name]} - {
                "node-name",
                "active",
            }
            # QEMU counts a file in sectors; the depth of a chain is told where it is asked for.
            assert different <= {"image", "backing_file_depth"}, (key, different)


def by_file(nodes: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Nodes by driver and file."""
    return {(entry["drv"], entry["file"]): entry for entry in nodes}


def ask_qemu(path: Path, *, flat: bool) -> list[dict[str, Any]]:
    """query-named-block-nodes of qemu-storage-daemon for the same image, opened once more beside ours."""
    socket = path.parent / "qsd.sock"
    options = f"driver=qcow2,node-name=top,read-only=on,force-share=on,file.driver=file,file.filename={path}"
    daemon = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", f"{options},file.force-share=on,file.read-only=on",
         "--chardev", f"socket,id=c,path={socket},server=on,wait=on", "--monitor", "chardev=c"]
    )  # fmt: skip
    try:
        while not socket.exists():
            assert daemon.poll() is None
        with QmpClient(socket) as client:
            nodes: list[dict[str, Any]] = client.cmd("query-named-block-nodes", {"flat": flat})
            for entry in nodes:
                entry["ro"] = entry["ro"] and "base" in entry["file"]
            client.cmd("quit")
        return nodes
    finally:
        daemon.kill()
        daemon.wait()
        socket.unlink(missing_ok=True)


def test_there_are_no_devices(qmp: QmpClient) -> None:
    assert qmp.cmd("query-block") == []


def test_busy_client_keeps_an_export_unless_told_otherwise(
    qmp: QmpClient, server: NbdBackend, chain: Path
) -> None:
    qmp.cmd("blockdev-add", node(chain))
    qmp.cmd("block-export-add", export(writable=True))
    client = NbdClient(server.nbd_path, "top")
    assert refused(qmp, "block-export-del", {"id": "e"}) == "export 'e' still in use"
    qmp.cmd("block-export-del", {"id": "e", "mode": "hard"})
    with pytest.raises((NbdError, OSError, AssertionError)):
        client.read(0, 512)
    client.abandon()
    qmp.cmd("blockdev-del", {"node-name": "top"})


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("blockdev-add", {"driver": "null-co"}, "'node-name' must be specified for the root node"),
        ("blockdev-add", {"driver": "null-co", "node-name": "9"}, "Invalid node-name: '9'"),
        ("blockdev-add", {"driver": "null-co", "node-name": "n"}, "Duplicate nodes with node-name='n'"),
        ("blockdev-add", {"driver": "null-co", "node-name": "n" * 32}, "Node name too long"),
        (
            "blockdev-add",
            {"driver": "zzz", "node-name": "x"},
            "Parameter 'driver' does not accept value 'zzz'",
        ),
        ("blockdev-add", {"node-name": "x"}, "Parameter 'driver' is missing"),
        ("blockdev-add", {"driver": "qcow2", "node-name": "x"}, "Parameter 'file' is missing"),
        (
            "blockdev-add",
            {"driver": "qcow2", "node-name": "x", "file": {"driver": "file"}},
            "Parameter 'file.filename' is missing",
        ),
        (
            "blockdev-add",
            {"driver": "file", "node-name": "x", "filename": "/nonexistent"},
            "Could not open '/nonexistent': No such file or directory",
        ),
        ("blockdev-del", {"node-name": "x"}, "Failed to find node with node-name='x'"),
        ("blockdev-del", {"node-name": "n"}, "Node n is in use"),
        ("block-export-add", export("x"), "Cannot find device='' nor node-name='x'"),
        ("block-export-add", export("n"), "Block export id 'e' is already in use"),
        ("block-export-add", export("n", id="f"), "NBD server already has export named 'n'"),
        ("block-export-add", export("n", id="9"), "Invalid block export id"),
        ("block-export-add", export("r", id="g", writable=True), "Cannot export read-only node as writable"),
        ("block-export-add", export("n", type="foo"), "Parameter 'type' does not accept value 'foo'"),
        ("block-export-del", {"id": "x"}, "Export 'x' is not found"),
        ("nbd-server-add", {"device": "n"}, "NBD server already has export named 'n'"),
        ("nbd-server-add", {"device": "x"}, "Cannot find device='x' nor node-name='x'"),
        ("nbd-server-remove", {"name": "x"}, "Export 'x' is not found"),
    ],
)
def test_refusals_have_the_texts_that_clients_know(
    qmp: QmpClient, command: str, arguments: dict[str, Any], text: str
) -> None:
    qmp.cmd("blockdev-add", {"driver": "null-co", "node-name": "n", "size": MIB})
    qmp.cmd("blockdev-add", {"driver": "null-co", "node-name": "r", "size": MIB, "read-only": True})
    qmp.cmd("block-export-add", export("n"))
    assert refused(qmp, command, arguments) == text


def test_older_commands_for_exports(qmp: QmpClient, server: NbdBackend) -> None:
    qmp.cmd("blockdev-add", {"driver": "null-co", "node-name": "n", "size": MIB})
    qmp.cmd("nbd-server-add", {"device": "n", "name": "old", "writable": True, "description": "d"})
    assert qmp.cmd("query-block-exports") == [
        {"id": "old", "type": "nbd", "node-name": "n", "shutting-down": False}
    ]
    qmp.cmd("nbd-server-remove", {"name": "old"})
    assert list_exports(server.nbd_path) == []


def test_schema_names_every_drivers_options(qmp: QmpClient) -> None:
    schema = {entry["name"]: entry for entry in qmp.cmd("query-qmp-schema")}
    union = schema[schema["blockdev-add"]["arg-type"]]
    assert union["tag"] == "driver"
    cases = {variant["case"]: variant["type"] for variant in union["variants"]}
    assert "backing" in {member["name"] for member in schema[cases["qcow2"]]["members"]}
    assert "filename" in {member["name"] for member in schema[cases["file"]]["members"]}
