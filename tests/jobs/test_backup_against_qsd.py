"""What a backup is refused with: the same commands go to qemu-storage-daemon and to us.

The texts are the same, but for a few that we mean to be different.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.qmp import QmpClient, QmpError
from tests.support.server import NbdBackend

MiB = 1 << 20
Case = tuple[str, dict[str, Any]]


def blockdev(**changes: Any) -> Case:
    """blockdev-backup from "source" to "target", with changes; None leaves a member out."""
    arguments = {"job-id": "j", "device": "source", "target": "target", "sync": "full"}
    chosen = arguments | {name.replace("_", "-"): value for name, value in changes.items()}
    return "blockdev-backup", {name: value for name, value in chosen.items() if value is not None}


def drive(**changes: Any) -> Case:
    return "drive-backup", blockdev(**{"target": "{new}", **changes})[1]


SAME: dict[str, Case] = {
    "no device": blockdev(device=None),
    "no target": blockdev(target=None),
    "no sync": blockdev(sync=None),
    "unknown device": blockdev(device="other"),
    "unknown target": blockdev(target="other"),
    "unknown sync": blockdev(sync="half"),
    "unknown member": blockdev(surprise=1),
    "unknown tuning": blockdev(x_perf={"surprise": 1}),
    "source is target": blockdev(target="source"),
    "another size": blockdev(target="small"),
    "no workers": blockdev(x_perf={"max-workers": 0}),
    "too many workers": blockdev(x_perf={"max-workers": 1 << 31}),
    "negative chunk": blockdev(x_perf={"max-chunk": -1}),
    "speed": blockdev(speed=-1),
    "speed of another type": blockdev(speed="fast"),
    "policy": blockdev(on_source_error="panic"),
    "id": blockdev(job_id="1"),
    "drive: unknown device": drive(device="other"),
    "drive: no such directory": drive(target="{new}/new", format="raw"),
    "drive: not there": drive(mode="existing", format="raw"),
    "drive: unknown mode": drive(mode="new"),
    "drive: id": drive(job_id="1", format="raw"),
}

# (what is sent, what qemu-storage-daemon says, what we say)
DIFFERENT: dict[str, tuple[Case, str, str]] = {
    "read-only target": (
        blockdev(target="fixed"),
        "Could not create node: Block node is read-only",
        "Block node is read-only: job 'j' (backup target) cannot write to node 'fixed'",
    ),
    "compress": (  # they name the drive by its guest's device, which no node here has
        blockdev(compress=True),
        "Compression is not supported for this drive ",
        "Compression is not supported for this drive target",
    ),
    "filter's name": (
        blockdev(filter_node_name="1"),
        "Could not create node: Invalid node-name: '1'",
        "Invalid node-name: '1'",
    ),
    "filter's name is taken": (
        blockdev(filter_node_name="target"),
        "Could not create node: Duplicate nodes with node-name='target'",
        "Duplicate nodes with node-name='target'",
    ),
    "bitmaps": (  # not there yet
        blockdev(sync="incremental"),
        "must provide a valid bitmap name for 'incremental' sync mode",
        "Parameter 'sync' does not accept value 'incremental'",
    ),
    "a bitmap": (
        blockdev(bitmap="b", bitmap_mode="always"),
        "Bitmap 'b' could not be found",
        "Parameter 'bitmap' is unexpected",
    ),
}


@pytest.fixture(scope="module")
def qsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QmpClient]:
    program = shutil.which("qemu-storage-daemon")
    assert program, "qemu-storage-daemon is not installed (Debian package qemu-system-common)"
    path = tmp_path_factory.mktemp("qsd") / "qmp"
    chardev = f"socket,id=c,path={path},server=on,wait=off"
    pid_file = path.with_name("pid")
    daemon = subprocess.Popen(
        [program, "--chardev", chardev, "--monitor", "chardev=c", "--pidfile", str(pid_file)]
    )
    while not pid_file.exists():  # written when everything listens
        assert daemon.poll() is None
    try:
        with QmpClient(path) as client:
            add_nodes(client)
            yield client
    finally:
        daemon.kill()
        daemon.wait(30)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QmpClient]:
    with NbdBackend(directory=tmp_path_factory.mktemp("ours")) as server, server.qmp() as client:
        add_nodes(client)
        yield client


def add_nodes(qmp: QmpClient) -> None:
    for name, size in (("source", MiB), ("target", MiB), ("small", MiB // 2), ("fixed", MiB)):
        null = {"driver": "null-co", "node-name": name, "size": size, "read-zeroes": True}
        qmp.cmd("blockdev-add", {**null, "read-only": name == "fixed"})


def answer(qmp: QmpClient, case: Case, directory: Path) -> str:
    """The error's class and text; the files named are not there before and after."""
    command, arguments = case
    new = directory / "new"
    filled = {
        name: value.replace("{new}", str(new)) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    with pytest.raises(QmpError) as refused:
        qmp.cmd(command, filled)
    new.unlink(missing_ok=True)  # qemu-storage-daemon leaves what it made
    assert qmp.cmd("query-jobs") == []
    return f"{refused.value.kind}: {refused.value.desc}"


@pytest.mark.parametrize("name", SAME)
def test_refusals_are_those_that_clients_know(
    qsd: QmpClient, ours: QmpClient, tmp_path: Path, name: str
) -> None:
    assert answer(ours, SAME[name], tmp_path) == answer(qsd, SAME[name], tmp_path)


@pytest.mark.parametrize("name", DIFFERENT)
def test_refusals_that_are_meant_to_be_different(
    qsd: QmpClient, ours: QmpClient, tmp_path: Path, name: str
) -> None:
    case, theirs, text = DIFFERENT[name]
    assert answer(qsd, case, tmp_path) == f"GenericError: {theirs}"
    assert answer(ours, case, tmp_path) == f"GenericError: {text}"
