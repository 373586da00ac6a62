"""A backup shows the disk as it was when the job began, whatever guests write meanwhile."""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.qmp import QmpClient, QmpError
from tests.support.server import NbdBackend
from tests.support.stamps import CLUSTER, Moment, StampingGuest

KiB, MiB = 1 << 10, 1 << 20
SIZE = 4 * MiB + 20 * KiB  # the last cluster is not whole
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
STARTS = 1500 if NIGHTLY else 30  # of each test

FAST: dict[str, Any] = {}
PIECEMEAL = {"x-perf": {"max-chunk": CLUSTER, "max-workers": 2}}
ALL_THROUGH_SCRATCH = {"cbw-memory": 0, **PIECEMEAL}
TINY_STORE = {"cbw-memory": 2 * CLUSTER, "cbw-scratch": -1, **PIECEMEAL}
TINY_SCRATCH = {"cbw-memory": 0, "cbw-scratch": 3 * CLUSTER, **PIECEMEAL}
LARGE_CLUSTERS = {"x-perf": {"min-cluster-size": 4 * CLUSTER, "max-workers": 8}}


def source_image(kind: str, directory: Path) -> tuple[Path, list[str]]:
    """A disk of zeroes, and the options to serve it by."""
    if kind == "raw":
        return images.create(directory / "source", SIZE, fmt="raw"), ["--format", "raw"]
    base = images.create(directory / "base", SIZE)
    if kind == "qcow2":
        return base, []
    middle = images.create(directory / "middle", backing=base)
    return images.create(directory / "source", backing=middle), []


def add_target(qmp: QmpClient, path: Path, *, delay_us: int = 0) -> None:
    """A raw file as node "target"; each write to it takes so long."""
    images.create(path, SIZE, fmt="raw")
    file: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if delay_us:
        rule = {"operations": ["write"], "delay-ns": delay_us * 1000}
        file = {"driver": "error-inject", "file": file, "rules": [rule]}
    qmp.cmd("blockdev-add", {"driver": "raw", "node-name": "target", "file": file})


def back_up(qmp: QmpClient, guest: StampingGuest, **options: Any) -> Moment:
    """Start job "j"; when it may have begun."""
    begin = guest.tick()
    qmp.cmd(
        "blockdev-backup", {"job-id": "j", "device": "sda", "target": "target", "sync": "full", **options}
    )
    return Moment(begin, guest.tick())


@pytest.mark.parametrize("delay_us", [0, 300], ids=["fast", "slow"])
@pytest.mark.parametrize("source", ["raw", "qcow2", "chain"])
def test_the_target_is_the_disk_at_the_start(tmp_path: Path, source: str, delay_us: int) -> None:
    image, serve = source_image(source, tmp_path)
    choose = random.Random(f"{source} {delay_us}")
    ways = [FAST, PIECEMEAL, ALL_THROUGH_SCRATCH, TINY_STORE, TINY_SCRATCH, LARGE_CLUSTERS]
    server = NbdBackend(f"sda={image}", directory=tmp_path, options=["--scratch-dir", tmp_path, *serve])
    with server, server.qmp() as qmp:
        add_target(qmp, tmp_path / "target", delay_us=delay_us)
        with StampingGuest(server.nbd_path, SIZE, seed=choose.randrange(1000)) as guest:
            for _ in range(STARTS):
                options = choose.choice(ways)
                moment = back_up(qmp, guest, **options)
                end = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
                qmp.wait_job("j", "null")
                assert "error" not in end, options
                assert guest.wrong((tmp_path / "target").read_bytes(), moment) == [], options
    if source != "raw":
        images.check(image)


def test_a_cancelled_backup_leaves_the_next_one_right(tmp_path: Path) -> None:
    image, _ = source_image("chain", tmp_path)
    choose = random.Random(7)
    ways: list[dict[str, Any]] = [PIECEMEAL, TINY_STORE]
    server = NbdBackend(f"sda={image}", directory=tmp_path, options=["--scratch-dir", tmp_path])
    with server, server.qmp() as qmp:
        add_target(qmp, tmp_path / "target", delay_us=300)
        with StampingGuest(server.nbd_path, SIZE, seed=1) as guest:
            for _ in range(STARTS // 2):
                back_up(qmp, guest, **choose.choice(ways))
                time.sleep(choose.uniform(0, 0.03))  # anywhere in the backup's life, its end included
                with suppress(QmpError):  # it may have ended by itself
                    qmp.cmd("job-cancel", {"id": "j"})
                qmp.wait_job("j", "null")
                moment = back_up(qmp, guest)
                qmp.wait_job("j", "null")
                assert guest.wrong((tmp_path / "target").read_bytes(), moment) == []


def test_a_full_store_breaks_the_backup_and_not_the_guest_when_told_to(tmp_path: Path) -> None:
    image, _ = source_image("qcow2", tmp_path)
    broken = 0
    server = NbdBackend(f"sda={image}", directory=tmp_path, options=["--scratch-dir", tmp_path])
    with server, server.qmp() as qmp:
        add_target(qmp, tmp_path / "target", delay_us=2000)
        with StampingGuest(server.nbd_path, SIZE, seed=2) as guest:
            for _ in range(STARTS // 4):
                moment = back_up(qmp, guest, **{**TINY_STORE, "on-cbw-error": "break-snapshot"})
                end = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
                qmp.wait_job("j", "null")
                if "error" in end:
                    broken += 1
                    assert "'sda' at the start of the backup could not be kept: No space" in end["error"]
                else:
                    assert guest.wrong((tmp_path / "target").read_bytes(), moment) == []
    assert broken > 0


def test_two_backups_at_once_show_two_moments(tmp_path: Path) -> None:
    image, _ = source_image("chain", tmp_path)
    choose = random.Random(3)
    server = NbdBackend(f"sda={image}", directory=tmp_path, options=["--scratch-dir", tmp_path])
    with server, server.qmp() as qmp:
        add_target(qmp, tmp_path / "target", delay_us=200)
        second = images.create(tmp_path / "second", SIZE, fmt="raw")
        file = {"driver": "file", "filename": str(second)}
        qmp.cmd("blockdev-add", {"driver": "raw", "node-name": "second", "file": file})
        with StampingGuest(server.nbd_path, SIZE, seed=3) as guest:
            for _ in range(STARTS // 2):
                first_moment = back_up(qmp, guest, **PIECEMEAL)
                speed = choose.choice([0, 100 * MiB])  # so that now this one, now the other ends first
                options = {"job-id": "k", "target": "second", "speed": speed}
                second_moment = back_up(qmp, guest, **options)
                for job in ("j", "k"):
                    qmp.wait_job(job, "null")
                first, then = sorted(
                    [(first_moment, tmp_path / "target"), (second_moment, second)], key=lambda pair: pair[0]
                )
                assert guest.wrong(first[1].read_bytes(), first[0]) == []
                assert guest.wrong(then[1].read_bytes(), then[0]) == []
                assert [e for e in qmp.events if e["event"] == "BLOCK_JOB_ERROR"] == []
                qmp.events.clear()
