"""Backups whose source, target or store fails, is slow, or stands still; guests do not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.nbd_client import Command, NbdClient
from tests.support.qmp import QmpClient, QmpError
from tests.support.server import NbdBackend

KiB, MiB = 1 << 10, 1 << 20
SIZE = 3 * MiB
CLUSTER = 64 * KiB
ONE_BY_ONE = {"max-workers": 1, "max-chunk": CLUSTER}
PLACES = (0, SIZE // 2, SIZE - CLUSTER)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdBackend]:
    """A server without images; nodes and exports are added by the tests."""
    images.create(tmp_path / "source", SIZE, fmt="raw")
    images.qemu_io(tmp_path / "source", f"write -P 1 0 {SIZE}", fmt="raw")
    images.create(tmp_path / "target", SIZE, fmt="raw")
    with NbdBackend(directory=tmp_path, options=["--scratch-dir", tmp_path]) as running:
        yield running


@pytest.fixture
def qmp(server: NbdBackend) -> Iterator[QmpClient]:
    with server.qmp() as client:
        yield client


def add_node(qmp: QmpClient, name: str, path: Path, *rules: dict[str, Any]) -> None:
    """A raw file with faults; "source" is exported too."""
    file = {"driver": "file", "filename": str(path)}
    faulty = {"driver": "error-inject", "file": file, "rules": list(rules)}
    qmp.cmd("blockdev-add", {"driver": "raw", "node-name": name, "file": faulty})
    if name == "source":
        qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": name, "writable": True})


def start(qmp: QmpClient, **options: Any) -> None:
    """Begin a backup; options in Python's spelling."""
    chosen = {name.replace("_", "-"): value for name, value in options.items()}
    arguments = {"job-id": "j", "device": "source", "target": "target", "sync": "full", **chosen}
    qmp.cmd("blockdev-backup", arguments)


def faults(operation: str, error: str) -> list[dict[str, Any]]:
    """The first, a middle and the last request fail, each once."""
    return [
        {"operations": [operation], "offset": at, "length": CLUSTER, "errno": error, "count": 1}
        for at in PLACES
    ]


@contextmanager
def faulty_backup(qmp: QmpClient, tmp_path: Path, operation: str, error: str) -> Iterator[dict[str, Any]]:
    """Source and target with faults on one side; the block gets the options that make a policy act on it."""
    rules = {"read": [], "write": [], operation: faults(operation, error)}
    add_node(qmp, "source", tmp_path / "source", *rules["read"])
    add_node(qmp, "target", tmp_path / "target", *rules["write"])
    yield {"x_perf": ONE_BY_ONE}
    assert (tmp_path / "target").read_bytes() == b"\x01" * SIZE


SIDES = {"read": "on_source_error", "write": "on_target_error"}
side = pytest.mark.parametrize("operation", SIDES)


@side
def test_report_fails_the_job_and_the_next_one_can_begin(
    tmp_path: Path, qmp: QmpClient, operation: str
) -> None:
    with faulty_backup(qmp, tmp_path, operation, "EIO") as options:
        for _ in PLACES:
            start(qmp, **options)
            failure = qmp.wait_event("BLOCK_JOB_ERROR")["data"]
            assert failure == {"device": "j", "operation": operation, "action": "report"}
            assert qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]["error"] == "Input/output error"
            qmp.wait_job("j", "null")
        start(qmp, **options)
        assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]


@side
@pytest.mark.parametrize(
    ("policy", "error", "status"), [("stop", "EIO", "failed"), ("enospc", "ENOSPC", "nospace")]
)
def test_stop_pauses_until_resume(
    tmp_path: Path, qmp: QmpClient, operation: str, policy: str, error: str, status: str
) -> None:
    with faulty_backup(qmp, tmp_path, operation, error) as options:
        start(qmp, **options, **{SIDES[operation]: policy})
        for _ in PLACES:
            assert qmp.wait_event("BLOCK_JOB_ERROR")["data"]["action"] == "stop"
            qmp.wait_job("j", "paused")
            assert qmp.cmd("query-block-jobs")[0]["io-status"] == status
            assert qmp.cmd("query-jobs")[0]["stall"] == f"stopped by an error ({status})"
            qmp.cmd("job-resume", {"id": "j"})
        assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]


@side
def test_ignore_tries_again(tmp_path: Path, qmp: QmpClient, operation: str) -> None:
    with faulty_backup(qmp, tmp_path, operation, "EIO") as options:
        start(qmp, **options, **{SIDES[operation]: "ignore"})
        assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        actions = {event["data"]["action"] for event in qmp.events if event["event"] == "BLOCK_JOB_ERROR"}
        assert actions == {"ignore"}


def test_a_policy_of_one_side_says_nothing_of_the_other(tmp_path: Path, qmp: QmpClient) -> None:
    add_node(qmp, "source", tmp_path / "source")
    add_node(qmp, "target", tmp_path / "target", *faults("write", "EIO"))
    start(qmp, on_source_error="ignore")
    assert qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]["error"] == "Input/output error"


def test_old_data_that_cannot_be_read_fails_the_backup_and_not_the_guest(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient
) -> None:
    add_node(qmp, "source", tmp_path / "source", *faults("read", "EIO")[1:2])
    add_node(qmp, "target", tmp_path / "target")
    start(qmp, speed=1, on_source_error="ignore")
    with NbdClient(server.nbd_path) as guest:
        guest.write(PLACES[1], b"\x22" * CLUSTER)
        qmp.cmd("block-job-set-speed", {"device": "j", "speed": 0})
        error = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]["error"]
        assert error == (
            "The state of 'source' at the start of the backup could not be kept: Input/output error"
        )
        qmp.wait_job("j", "null")
        guest.write(0, b"\x22" * CLUSTER)
        assert guest.read(PLACES[1], 4) == b"\x22" * 4


def test_guests_wait_for_room_in_a_store_that_is_full_and_then_go_on(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient
) -> None:
    add_node(qmp, "source", tmp_path / "source")
    add_node(qmp, "target", tmp_path / "target")
    start(qmp, speed=1, cbw_memory=2 * CLUSTER, cbw_scratch=-1, x_perf={"min-cluster-size": CLUSTER})
    with NbdClient(server.nbd_path) as guest:
        waiting = guest.submit(Command.WRITE, 0, SIZE, data=b"\x22" * SIZE)
        full = "the local store is full: guest writes wait"
        while (job := qmp.cmd("query-jobs")[0]).get("stall") != full or not job["cbw-waits"]:
            pass
        assert job["cbw-memory"] == 2 * CLUSTER
        qmp.cmd("block-job-set-speed", {"device": "j", "speed": 0})
        guest.wait(waiting)
    assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    assert (tmp_path / "target").read_bytes() == b"\x01" * SIZE
    assert (tmp_path / "source").read_bytes() == b"\x22" * SIZE


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"cbw_timeout": 1}, "Connection timed out"), ({"on_cbw_error": "break-snapshot"}, "No space left")],
)
def test_a_guest_waits_no_longer_than_it_was_told(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient, options: dict[str, Any], reason: str
) -> None:
    add_node(qmp, "source", tmp_path / "source")
    add_node(qmp, "target", tmp_path / "target")
    start(qmp, speed=1, cbw_memory=2 * CLUSTER, cbw_scratch=-1, **options)
    with NbdClient(server.nbd_path) as guest:
        guest.write(0, b"\x22" * SIZE)
    qmp.cmd("block-job-set-speed", {"device": "j", "speed": 0})
    assert reason in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]["error"]


@pytest.mark.parametrize("verb", ["job-cancel", "quit"])
def test_guests_that_wait_for_room_go_on_when_the_backup_is_cancelled(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient, verb: str
) -> None:
    add_node(qmp, "source", tmp_path / "source")
    add_node(qmp, "target", tmp_path / "target")
    start(qmp, speed=1, cbw_memory=2 * CLUSTER, cbw_scratch=-1)
    with NbdClient(server.nbd_path) as guest:
        waiting = guest.submit(Command.WRITE, 0, SIZE, data=b"\x22" * SIZE)
        while not qmp.cmd("query-jobs")[0]["cbw-waits"]:
            pass
        qmp.cmd(verb, {"id": "j"} if verb == "job-cancel" else None)
        guest.wait(waiting)
    assert (tmp_path / "source").read_bytes() == b"\x22" * SIZE
    if verb == "quit":
        server.kill()
        server.start()


# ---- targets at other servers ----


@contextmanager
def nbdkit(path: Path, *filters: str, delays: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """An NBD server that holds a disk in memory."""
    command = ["nbdkit", "-f", "-U", str(path), *filters, "memory", f"size={SIZE}", *delays]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        while not path.exists():
            assert process.poll() is None
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def add_nbd_target(qmp: QmpClient, path: Path) -> None:
    server = {"type": "unix", "path": str(path)}
    qmp.cmd("blockdev-add", {"driver": "nbd", "node-name": "target", "server": server})


def content(path: Path) -> bytes:
    with NbdClient(path) as client:
        return client.read(0, SIZE)


def test_guests_do_not_wait_for_a_target_that_stands_still(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient
) -> None:
    add_node(qmp, "source", tmp_path / "source")
    with nbdkit(tmp_path / "nbdkit") as target:
        add_nbd_target(qmp, tmp_path / "nbdkit")
        os.kill(target.pid, signal.SIGSTOP)
        start(qmp, cbw_memory=SIZE // 2)  # so that half of the old data goes to the scratch file
        with NbdClient(server.nbd_path) as guest:
            for at in range(0, SIZE, CLUSTER):
                guest.write(at, b"\x22" * CLUSTER)
            guest.flush()
            assert qmp.cmd("query-jobs")[0]["current-progress"] < SIZE
            os.kill(target.pid, signal.SIGCONT)
            assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
            assert guest.read(0, SIZE) == b"\x22" * SIZE
        assert content(tmp_path / "nbdkit") == b"\x01" * SIZE
        qmp.wait_job("j", "null")
        qmp.cmd("blockdev-del", {"node-name": "target"})


def test_a_slow_target_gets_all_of_it(tmp_path: Path, server: NbdBackend, qmp: QmpClient) -> None:
    add_node(qmp, "source", tmp_path / "source")
    with nbdkit(tmp_path / "nbdkit", "--filter=rate", delays=["rate=80M"]):  # bits
        add_nbd_target(qmp, tmp_path / "nbdkit")
        start(qmp, cbw_memory=SIZE // 2)  # so that half of the old data goes to the scratch file
        with NbdClient(server.nbd_path) as guest:
            guest.write(0, b"\x22" * SIZE)
        assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        assert content(tmp_path / "nbdkit") == b"\x01" * SIZE
        qmp.wait_job("j", "null")
        qmp.cmd("blockdev-del", {"node-name": "target"})


@pytest.mark.parametrize("policy", ["report", "stop"])
def test_a_target_that_dies_ends_or_stops_the_backup_and_guests_go_on(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient, policy: str
) -> None:
    add_node(qmp, "source", tmp_path / "source")
    with nbdkit(tmp_path / "nbdkit", "--filter=delay", delays=["wdelay=50ms"]) as target:
        add_nbd_target(qmp, tmp_path / "nbdkit")
        start(qmp, on_target_error=policy, x_perf=ONE_BY_ONE)
        with NbdClient(server.nbd_path) as guest:
            guest.write(SIZE // 2, b"\x22" * CLUSTER)
            target.kill()
            error = qmp.wait_event("BLOCK_JOB_ERROR")["data"]
            assert error == {"device": "j", "operation": "write", "action": policy}
            guest.write(SIZE // 4, b"\x22" * CLUSTER)
            if policy == "stop":
                qmp.wait_job("j", "paused")
                qmp.cmd("job-cancel", {"id": "j"})
                qmp.wait_event("BLOCK_JOB_CANCELLED")
            else:
                assert qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]["error"] == "Connection reset by peer"
            qmp.wait_job("j", "null")
            guest.write(SIZE // 8, b"\x22" * CLUSTER)
            assert guest.read(0, 4) == b"\x01" * 4
    # The user knows already that nothing in it is safe: neither this nor the server's end fails.
    if policy == "report":
        qmp.cmd("blockdev-del", {"node-name": "target"})


@contextmanager
def hanging_backup(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A backup whose target has stopped to answer, and with it the copying."""
    add_node(qmp, "source", tmp_path / "source")
    with nbdkit(tmp_path / "nbdkit") as target:
        add_nbd_target(qmp, tmp_path / "nbdkit")
        os.kill(target.pid, signal.SIGSTOP)
        start(qmp, **options)
        qmp.wait_job("j", "running")
        with NbdClient(server.nbd_path) as guest:
            guest.write(0, b"\x22" * CLUSTER)
        yield target


@pytest.mark.parametrize("sync", ["full", "none"])
def test_a_backup_to_a_target_that_hangs_can_be_cancelled(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient, sync: str
) -> None:
    with hanging_backup(tmp_path, server, qmp, sync=sync), NbdClient(server.nbd_path) as guest:
        qmp.cmd("job-cancel", {"id": "j"})
        guest.write(CLUSTER, b"\x22" * CLUSTER)
        qmp.wait_event("BLOCK_JOB_CANCELLED")
        qmp.wait_job("j", "null")
        guest.write(SIZE // 2, b"\x22" * CLUSTER)
        guest.flush()
        qmp.cmd("blockdev-del", {"node-name": "target"})
    assert "'target' does not answer: it is given up" in server.log()


def test_the_server_ends_in_seconds_when_a_backups_target_hangs(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient
) -> None:
    with hanging_backup(tmp_path, server, qmp):
        begin = time.monotonic()
        server.stop()
        assert time.monotonic() - begin < 10
    server.start()


def test_a_target_that_answers_survives_the_cancel_of_a_backup(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient
) -> None:
    add_node(qmp, "source", tmp_path / "source")
    with nbdkit(tmp_path / "nbdkit", "--filter=rate", delays=["rate=12M", "burstiness=0.1"]):  # bits
        add_nbd_target(qmp, tmp_path / "nbdkit")
        start(qmp, speed=1)
        qmp.cmd("job-cancel", {"id": "j"})
        qmp.wait_job("j", "null")
        start(qmp)  # which lasts longer than the target of the first would have had to answer
        assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        qmp.wait_job("j", "null")
        qmp.cmd("blockdev-del", {"node-name": "target"})


def test_a_lost_node_is_removed_by_the_second_blockdev_del(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient
) -> None:
    with nbdkit(tmp_path / "nbdkit") as remote:
        add_nbd_target(qmp, tmp_path / "nbdkit")
        export = {"type": "nbd", "id": "e", "node-name": "target", "writable": True}
        qmp.cmd("block-export-add", export)
        with NbdClient(server.nbd_path) as guest:
            guest.write(0, b"\x22" * CLUSTER)
        remote.kill()
        remote.wait()
        qmp.cmd("block-export-del", {"id": "e", "mode": "hard"})
        with pytest.raises(QmpError, match="Could not flush node 'target': Connection reset"):
            qmp.cmd("blockdev-del", {"node-name": "target"})
        qmp.cmd("blockdev-del", {"node-name": "target"})
        assert qmp.cmd("query-named-block-nodes") == []
