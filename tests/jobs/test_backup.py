"""Backups by QMP, through a running server: what is copied, who is refused, and how a job is steered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.testing import EventRecorder
from tests.jobs.event_orders import ORDERS, Order
from tests.support import images
from tests.support.nbd_client import NbdClient
from tests.support.qmp import QmpClient, QmpError
from tests.support.server import NbdBackend

KiB, MiB = 1 << 10, 1 << 20
SIZE = 2 * MiB + 12 * KiB
CLUSTER = 64 * KiB


def make_source(directory: Path, kind: str) -> Path:
    """A disk with data in each layer, and a hole, zeroes and data of its own in the top one."""
    if kind == "raw":
        top = images.create(directory / "source", SIZE, fmt="raw")
        images.qemu_io(top, "write -P 1 100k 900k", f"write -P 2 {2 * MiB} 12k", fmt="raw")
        return top
    if kind == "layer":
        top = images.create(directory / "source", SIZE)
        images.qemu_io(top, "write -P 1 0 1M", "write -z 128k 64k")
        return top
    base_fmt = "raw" if kind == "raw base" else "qcow2"
    base = images.create(directory / "base", SIZE, fmt=base_fmt)
    images.qemu_io(base, f"write -P 3 0 {SIZE}", fmt=base_fmt)
    middle = images.create(directory / "middle", backing=base, backing_fmt=base_fmt)
    images.qemu_io(middle, "write -P 4 512k 512k", "write -z 1M 64k")
    top = images.create(directory / "source", backing=middle)
    images.qemu_io(top, "write -P 5 600k 10k", "write -z 256k 128k", "discard 1536k 64k")
    return top


def serve(source: Path, directory: Path, *options: str) -> NbdBackend:
    return NbdBackend(f"sda={source}", directory=directory, options=["--scratch-dir", directory, *options])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdBackend]:
    """A single layer as node and export "sda"."""
    with serve(make_source(tmp_path, "layer"), tmp_path) as running:
        yield running
    images.check(tmp_path / "source")


@pytest.fixture
def qmp(server: NbdBackend) -> Iterator[QmpClient]:
    with server.qmp() as client:
        yield client


def add_raw(qmp: QmpClient, path: Path, name: str = "target", **options: Any) -> None:
    """A new raw file of the disk's size as a node."""
    images.create(path, SIZE, fmt="raw")
    file = {"driver": "file", "filename": str(path)}
    qmp.cmd("blockdev-add", {"driver": "raw", "node-name": name, "file": file, **options})


def holds(path: Path, *runs: tuple[int, int, int]) -> bool:
    """Whether a raw image, open or not, holds `value` in [start, end) KiB for each of the runs."""
    content = path.read_bytes()
    return all(content[a * KiB : b * KiB] == bytes([value]) * ((b - a) * KiB) for value, a, b in runs)


OLD = (1, 0, 128), (0, 128, 192), (1, 192, 1024), (0, 1024, SIZE // KiB)
"""What the single layer holds before guests write."""


def start(qmp: QmpClient, job: str = "j", **options: Any) -> None:
    """Begin a backup; options in Python's spelling."""
    chosen = {name.replace("_", "-"): value for name, value in options.items()}
    qmp.cmd("blockdev-backup", {"job-id": job, "device": "sda", "target": "target", "sync": "full", **chosen})


def start_endless(qmp: QmpClient, job: str = "j", **options: Any) -> None:
    """A backup that copies a cluster and then waits for hours."""
    start(qmp, job, speed=1, **options)


def refusal(qmp: QmpClient, command: str, **arguments: Any) -> str:
    with pytest.raises(QmpError) as refused:
        qmp.cmd(command, {name.replace("_", "-"): value for name, value in arguments.items()})
    assert refused.value.kind == "GenericError"
    return refused.value.desc


def info(qmp: QmpClient, job: str = "j") -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in qmp.cmd("query-jobs") if entry["id"] == job)
    return found


# ---- what is copied ----


@pytest.mark.parametrize("target_fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("kind", ["raw", "layer", "three layers", "raw base"])
def test_full_copies_what_the_chain_shows(tmp_path: Path, kind: str, target_fmt: str) -> None:
    source, target = make_source(tmp_path, kind), tmp_path / "target"
    fmt = "raw" if kind == "raw" else "qcow2"
    with serve(source, tmp_path, "--format", fmt) as running, running.qmp() as qmp:
        arguments = {"device": "sda", "target": str(target), "sync": "full", "format": target_fmt}
        qmp.cmd("drive-backup", {"job-id": "j", **arguments})
        done = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        assert done == {"type": "backup", "device": "j", "len": SIZE, "offset": SIZE, "speed": 0}
        qmp.wait_job("j", "null")
    images.compare(source, target, left_fmt=fmt, right_fmt=target_fmt)
    if target_fmt == "qcow2":
        images.check(target)
        assert "backing-filename" not in images.info(target)


@pytest.mark.parametrize("kind", ["three layers", "raw base"])
def test_top_copies_the_top_layer_over_the_same_backing_file(tmp_path: Path, kind: str) -> None:
    source, target = make_source(tmp_path, kind), tmp_path / "target"
    with serve(source, tmp_path) as running, running.qmp() as qmp:
        arguments = {"device": "sda", "target": str(target), "sync": "top"}
        qmp.cmd("drive-backup", {"job-id": "j", **arguments})
        # A cluster with data, two of zeroes over data, and a discarded one.
        assert qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]["len"] == 4 * CLUSTER
        qmp.wait_job("j", "null")
    images.check(target)
    images.compare(source, target)
    assert images.info(target)["backing-filename"] == str(tmp_path / "middle")
    assert all(extent["depth"] > 0 for extent in images.extents(target) if extent["start"] == 0)


def test_top_of_a_single_layer_is_all_that_it_has(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    start(qmp, sync="top")
    assert qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]["len"] == MiB
    qmp.cmd("blockdev-del", {"node-name": "target"})
    assert holds(tmp_path / "target", *OLD)


@pytest.mark.parametrize("target_fmt", ["raw", "qcow2"])
def test_none_keeps_what_guests_overwrite_until_it_is_cancelled(tmp_path: Path, target_fmt: str) -> None:
    source, target = make_source(tmp_path, "layer"), tmp_path / "target"
    with serve(source, tmp_path) as running, running.qmp() as qmp:
        qmp.cmd("drive-backup", drive_backup(target, sync="none", format=target_fmt))
        with NbdClient(running.nbd_path) as guest:
            for number, cluster in enumerate((0, 1, 2, 7), 1):  # of old data; the third is zeroes
                guest.write(cluster * CLUSTER + 5 * KiB, b"\x77" * KiB)
                while info(qmp)["current-progress"] < number * CLUSTER:
                    pass
        qmp.cmd("job-cancel", {"id": "j"})
        qmp.wait_job("j", "null")
        assert [event["event"] for event in qmp.events if "COMPLETED" in event["event"]] == []
    images.qemu_io(target, "read -P 1 0 128k", "read -P 0 128k 64k", "read -P 1 448k 64k", fmt=target_fmt)
    if target_fmt == "raw":
        assert holds(target, (0, 192, 448), (0, 512, 1024))
    else:
        images.check(target)
        allocated = [extent["length"] for extent in images.extents(target) if extent["depth"] == 0]
        assert sum(allocated) == 4 * CLUSTER


@pytest.mark.parametrize("size", [0, 512, MiB - 512])
def test_disks_of_odd_sizes(qmp: QmpClient, size: int) -> None:
    for name in ("small", "target"):
        null = {"driver": "null-co", "node-name": name, "size": size, "read-zeroes": True}
        qmp.cmd("blockdev-add", null)
    start(qmp, device="small")
    done = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    assert (done["len"], done["offset"], "error" in done) == (size, size, False)


def test_a_target_that_is_not_zero_is_overwritten_where_the_source_is(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    (tmp_path / "target").write_bytes(b"\xff" * SIZE)
    start(qmp)
    qmp.wait_job("j", "null")
    assert holds(tmp_path / "target", *OLD)


def test_an_explicit_overlay_as_target_keeps_zeroes_that_hide_its_backing_file(tmp_path: Path) -> None:
    source = make_source(tmp_path, "three layers")
    target = images.create(tmp_path / "target", backing=tmp_path / "middle")
    with serve(source, tmp_path) as running, running.qmp() as qmp:
        file = {"driver": "file", "filename": str(target)}
        for backing in (None, ...):
            options = {"driver": "qcow2", "node-name": "target", "file": file}
            qmp.cmd("blockdev-add", options if backing is ... else {**options, "backing": None})
            start(qmp, sync="top")
            qmp.wait_job("j", "null")
            qmp.cmd("blockdev-del", {"node-name": "target"})
    images.compare(source, target)


def test_job_create_starts_a_backup_as_any_job(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    options = {"device": "sda", "target": "target", "sync": "full", "on-source-error": "stop"}
    qmp.cmd("job-create", {"type": "backup", "id": "mine", "options": options})
    assert qmp.wait_event("JOB_COMPLETED")["data"]["success"] is True
    text = refusal(qmp, "job-create", type="backup", options={**options, "sync": "some"})
    assert "sync" in text
    assert "'verify' does not exist (there are: " in refusal(qmp, "job-create", type="verify")


def test_without_an_id_the_job_is_called_after_its_disk(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    qmp.cmd("blockdev-backup", {"device": "sda", "target": "target", "sync": "full", "speed": 1})
    qmp.cmd("block-job-cancel", {"device": "sda"})
    assert qmp.wait_event("BLOCK_JOB_CANCELLED")["data"]["device"] == "sda"


# ---- verbs ----

STORIES = [
    order
    for order in ORDERS
    if not order.abort_start
    and len(order.subjects) == 1
    and order.subjects[0].kind == "backup"
    and not order.subjects[0].prepare_error
]


@pytest.mark.parametrize("order", STORIES, ids=lambda order: order.name)
def test_events_come_in_the_order_that_clients_know(tmp_path: Path, server: NbdBackend, order: Order) -> None:
    with Recording(server.qmp_path) as qmp:
        subject = order.subjects[0]
        images.create(tmp_path / "target", SIZE, fmt="raw")
        name = {5: "EIO", 28: "ENOSPC", 0: None}[subject.error]
        rule = {"operations": ["write"], "errno": name, "count": 1}
        file = {"driver": "file", "filename": str(tmp_path / "target")}
        broken = {"driver": "error-inject", "file": file, "rules": [rule] if name else []}
        qmp.cmd("blockdev-add", {"driver": "raw", "node-name": "target", "file": broken})
        start(
            qmp, "j1", speed=int(subject.endless), on_target_error=subject.on_error,
            auto_finalize=subject.auto_finalize, auto_dismiss=subject.auto_dismiss,
        )  # fmt: skip
        for index, line in enumerate(order.script):
            if line.startswith(">"):
                verb, _, job = line[1:].partition(" ")
                qmp.cmd(verb, {"device" if verb.startswith("block-job") else "id": job})
            else:
                qmp.await_words(order.events(index + 1))
        qmp.cmd("query-jobs")  # what comes after the last word would be here by now
        assert qmp.recorder.words() == order.events()


class Recording(QmpClient):
    """A client that remembers all events in order."""

    def __init__(self, path: Path) -> None:
        self.recorder = EventRecorder()
        super().__init__(path)

    def receive(self, timeout: float = 10.0) -> dict[str, Any]:
        message = super().receive(timeout)
        if "event" in message:
            self.recorder(message["event"], message["data"])
        return message

    def await_words(self, expected: list[str]) -> None:
        """Read until these events have come, and no others before them."""
        while len(words := self.recorder.words()) < len(expected) and words == expected[: len(words)]:
            self.receive()
        assert words[: len(expected)] == expected


def test_speed_can_be_set_while_it_runs(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    start_endless(qmp)
    assert refusal(qmp, "block-job-set-speed", device="j", speed=-1) == (
        "Parameter 'speed' expects a non-negative value"
    )
    qmp.cmd("block-job-set-speed", {"device": "j", "speed": 0})
    assert qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]["speed"] == 0


def test_the_speed_limit_counts_what_is_copied(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    start_endless(qmp)
    qmp.cmd("job-pause", {"id": "j"})
    qmp.wait_job("j", "paused")
    assert info(qmp)["current-progress"] <= CLUSTER


def test_a_paused_backup_still_keeps_its_point_in_time(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient
) -> None:
    add_raw(qmp, tmp_path / "target")
    start_endless(qmp)
    qmp.cmd("job-pause", {"id": "j"})
    qmp.wait_job("j", "paused")
    with NbdClient(server.nbd_path) as guest:
        guest.write(0, b"\x99" * MiB)
    assert info(qmp)["cbw-memory"] > 0
    qmp.cmd("block-job-set-speed", {"device": "j", "speed": 0})
    qmp.cmd("job-resume", {"id": "j"})
    qmp.wait_job("j", "null")
    assert holds(tmp_path / "target", *OLD)


def test_what_was_copied_stays_when_a_pending_job_waits(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient
) -> None:
    add_raw(qmp, tmp_path / "target")
    start(qmp, auto_finalize=False)
    qmp.wait_job("j", "pending")
    with NbdClient(server.nbd_path) as guest:
        guest.write(0, b"\x99" * MiB)
    qmp.cmd("job-finalize", {"id": "j"})
    qmp.wait_job("j", "null")
    assert holds(tmp_path / "target", *OLD)


# ---- several at once ----


@pytest.mark.parametrize("first_to_end", ["j", "k"])
def test_filters_of_two_backups_are_removed_in_either_order(
    tmp_path: Path, server: NbdBackend, qmp: QmpClient, first_to_end: str
) -> None:
    before = {node["node-name"] for node in qmp.cmd("query-named-block-nodes")}
    for job in ("j", "k"):
        add_raw(qmp, tmp_path / job, job)
        start_endless(qmp, job, target=job, filter_node_name=f"filter-{job}")
    with NbdClient(server.nbd_path) as guest:
        guest.write(0, b"\x11" * 8 * KiB)
        for job in sorted("jk", key=lambda name: name != first_to_end):
            qmp.cmd("block-job-set-speed", {"device": job, "speed": 0})
            qmp.wait_job(job, "null")
            guest.write(512 * KiB, b"\x22" * 8 * KiB)
            assert guest.read(512 * KiB, 4) == b"\x22" * 4
    for job in ("j", "k"):
        assert holds(tmp_path / job, *OLD)
        qmp.cmd("blockdev-del", {"node-name": job})
    assert {node["node-name"] for node in qmp.cmd("query-named-block-nodes")} == before


def test_backups_of_two_layers_of_one_chain(tmp_path: Path) -> None:
    source = make_source(tmp_path, "three layers")
    base, middle = tmp_path / "base", tmp_path / "middle"
    with serve(source, tmp_path) as running, running.qmp() as qmp:
        names = {node["file"]: node["node-name"] for node in qmp.cmd("query-named-block-nodes")
                 if node["drv"] == "qcow2"}  # fmt: skip
        for number in range(
            20
        ):  # one layer's filter comes and goes while the other's threads read through it
            for job, layer in (("j", source), ("k", middle)):
                add_raw(qmp, tmp_path / f"{job}{number}", f"{job}{number}")
                options = {"device": names[str(layer)], "target": f"{job}{number}"}
                start(qmp, job, **options, x_perf={"max-chunk": CLUSTER})
            for job in ("j", "k"):
                qmp.wait_job(job, "null")
    images.check(base)
    for number in range(20):
        images.compare(source, tmp_path / f"j{number}", right_fmt="raw")
        images.compare(middle, tmp_path / f"k{number}", right_fmt="raw")


# ---- who is refused ----


def test_no_writer_is_let_to_the_target(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    start_endless(qmp)
    text = refusal(qmp, "block-export-add", type="nbd", id="e", node_name="target", writable=True)
    assert "unshared by job 'j' (backup target)" in text
    assert "job-cancel" in text
    qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "target"})
    qmp.cmd("job-cancel", {"id": "j"})


def test_a_target_that_guests_write_is_refused(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "target", "writable": True})
    text = refusal(qmp, "blockdev-backup", job_id="j", device="sda", target="target", sync="full")
    assert "export 'e'" in text
    assert "block-export-del" in text
    assert qmp.cmd("query-jobs") == []


def test_a_target_has_one_job(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    start_endless(qmp)
    text = refusal(qmp, "blockdev-backup", job_id="k", device="sda", target="target", sync="full")
    assert "unshared by job 'j' (backup target)" in text
    qmp.cmd("job-cancel", {"id": "j"})


@pytest.mark.parametrize(("device", "target"), [("target", "third"), ("third", "sda")])
def test_what_one_job_writes_no_other_can_back_up(
    tmp_path: Path, qmp: QmpClient, device: str, target: str
) -> None:
    add_raw(qmp, tmp_path / "target")
    add_raw(qmp, tmp_path / "third", "third")
    start_endless(qmp)
    text = refusal(qmp, "blockdev-backup", job_id="k", device=device, target=target, sync="full")
    assert "is busy: it is in use by job 'j' (backup" in text
    qmp.cmd("job-cancel", {"id": "j"})


@pytest.mark.parametrize("node", ["sda", "target", "filter"])
def test_nodes_of_a_running_backup_stay(tmp_path: Path, qmp: QmpClient, node: str) -> None:
    add_raw(qmp, tmp_path / "target")
    start_endless(qmp, filter_node_name="filter")
    assert node in refusal(qmp, "blockdev-del", node_name=node)
    qmp.cmd("job-cancel", {"id": "j"})


def test_a_filter_cannot_be_backed_up(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    add_raw(qmp, tmp_path / "second", "second")
    start_endless(qmp, filter_node_name="filter")
    text = refusal(qmp, "blockdev-backup", job_id="k", device="filter", target="second", sync="full")
    assert text.startswith("Node 'filter' is busy")
    qmp.cmd("job-cancel", {"id": "j"})


NO_STORE = (
    "The local store cannot hold one cluster of 65536 bytes: cbw-memory is 0, cbw-scratch is -1;"
    " raise one of them"
)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compress": True}, "Compression is not supported for this drive target"),
        ({"x-perf": {"max-workers": 0}}, "max-workers must be between 1 and 2147483647"),
        ({"x-perf": {"max-chunk": -1}}, "max-chunk must be zero (which means no limit) or positive"),
        ({"x-perf": {"min-cluster-size": 3}}, "min-cluster-size needs to be a power of 2"),
        ({"x-perf": {"min-cluster-size": 1 << 40}}, f"min-cluster-size too large: {1 << 40} > {64 * MiB}"),
        ({"cbw-memory": 0, "cbw-scratch": -1, "x-perf": {"min-cluster-size": CLUSTER}}, NO_STORE),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
        ({"filter-node-name": "sda"}, "Duplicate nodes with node-name='sda'"),
        ({"filter-node-name": "1"}, "Invalid node-name: '1'"),
        ({"job-id": "1"}, "Invalid job ID '1'"),
    ],
)  # fmt: skip
def test_bad_options_change_nothing(
    tmp_path: Path, qmp: QmpClient, options: dict[str, Any], text: str
) -> None:
    add_raw(qmp, tmp_path / "target")
    with pytest.raises(QmpError) as refused:
        start(qmp, **options)
    assert refused.value.desc == text
    start(qmp)
    qmp.wait_job("j", "null")


def test_huge_numbers_are_bounded_rather_than_obeyed(tmp_path: Path, qmp: QmpClient) -> None:
    add_raw(qmp, tmp_path / "target")
    most = 2**63 - 1
    tuning = {"max-chunk": most, "max-workers": 2**31 - 1}
    start(qmp, speed=most, x_perf=tuning, cbw_memory=most, cbw_scratch=most, cbw_timeout=most)
    assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]


def test_a_scratch_directory_that_went_missing_is_named(tmp_path: Path) -> None:
    source, missing = make_source(tmp_path, "layer"), tmp_path / "missing"
    missing.mkdir()
    server = NbdBackend(f"sda={source}", directory=tmp_path, options=["--scratch-dir", missing])
    with server as running, running.qmp() as qmp:
        missing.rmdir()
        add_raw(qmp, tmp_path / "target")
        text = refusal(qmp, "blockdev-backup", job_id="j", device="sda", target="target", sync="full")
        assert f"Could not make a scratch file in '{missing}'" in text
        start(qmp, cbw_scratch=-1)
        qmp.wait_job("j", "null")


# ---- drive-backup ----


def drive_backup(target: Path, **options: Any) -> dict[str, Any]:
    return {"job-id": "j", "device": "sda", "target": str(target), "sync": "full", **options}


@pytest.mark.parametrize("target_fmt", ["raw", "qcow2"])
def test_mode_existing_uses_the_file_that_is_there(tmp_path: Path, qmp: QmpClient, target_fmt: str) -> None:
    target = images.create(tmp_path / "target", SIZE, fmt=target_fmt)
    qmp.cmd("drive-backup", drive_backup(target, mode="existing", format=target_fmt))
    qmp.wait_job("j", "null")
    images.qemu_io(target, "read -P 1 0 128k", fmt=target_fmt)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"job-id": "1"}, "Invalid job ID '1'"),
        ({"filter-node-name": "sda"}, "Duplicate nodes with node-name='sda'"),
        ({"compress": True}, "Compression is not supported for this drive {target}"),
        ({"device": "other"}, "Cannot find device='other' nor node-name='other'"),
        ({"mode": "existing"}, "Could not open '{target}': No such file or directory"),
    ],
)
def test_a_drive_backup_that_is_refused_leaves_no_file_and_no_node(
    tmp_path: Path, qmp: QmpClient, options: dict[str, Any], text: str
) -> None:
    target = tmp_path / "target"
    before = qmp.cmd("query-named-block-nodes")
    with pytest.raises(QmpError) as refused:
        qmp.cmd("drive-backup", drive_backup(target, **options))
    assert refused.value.desc == text.format(target=target)
    assert not target.exists()
    assert qmp.cmd("query-named-block-nodes") == before


def test_an_open_image_is_never_a_new_target(tmp_path: Path, qmp: QmpClient) -> None:
    source = tmp_path / "source"
    content = source.read_bytes()
    with pytest.raises(QmpError, match="it is open as node"):
        qmp.cmd("drive-backup", drive_backup(source))
    assert source.read_bytes() == content


def test_a_file_of_another_size_is_refused_and_kept(tmp_path: Path, qmp: QmpClient) -> None:
    target = images.create(tmp_path / "target", MiB, fmt="raw")
    with pytest.raises(QmpError, match="Source and target image have different sizes"):
        qmp.cmd("drive-backup", drive_backup(target, mode="existing", format="raw"))
    assert target.stat().st_size == MiB


# ---- the end of the server ----


def test_sigterm_ends_a_backup_and_leaves_the_source_clean(tmp_path: Path) -> None:
    source = make_source(tmp_path, "three layers")
    with serve(source, tmp_path) as running, running.qmp() as qmp:
        add_raw(qmp, tmp_path / "target")
        start_endless(qmp)
        qmp.cmd("drive-backup", drive_backup(tmp_path / "second", **{"job-id": "k"}, speed=1))
        with NbdClient(running.nbd_path) as guest:
            guest.write(0, b"\x31" * MiB)
        running.stop()  # asserts exit status 0 and that nothing is left
        running.start()
    images.check(source)
    images.qemu_io(source, "read -P 0x31 0 1M", read_only=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("nbd-backend")) == []
