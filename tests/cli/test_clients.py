"""The commands that talk to a running server, and the demonstration."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images
from tests.support.server import NbdBackend, executable

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk with 16 MiB of data."""
    path = images.create(tmp_path / "disk.qcow2", 32 * MIB)
    images.qemu_io(path, "write -P 5 0 16M")
    return path


@pytest.fixture
def server(image: Path, tmp_path: Path) -> Iterator[NbdBackend]:
    """A server of it."""
    with NbdBackend(image, directory=tmp_path) as running:
        yield running


def command(server: NbdBackend, *words: str, expect: int = 0) -> str:
    """What a command prints to both outputs."""
    name, *rest = words
    done = subprocess.run(
        [str(executable()), name, *rest, "--qmp", f"unix:{server.qmp_path}"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def backup_to(path: Path, *more: str) -> list[str]:
    """The words that start a full backup."""
    return ["job", "start", "backup", "device=sda", f"target={path}", "sync=full", "job-id=b0", *more]


def test_backup_is_started_and_watched(server: NbdBackend, image: Path, tmp_path: Path) -> None:
    assert "job b0: done" in command(server, *backup_to(tmp_path / "backup.qcow2", "--watch"))
    server.stop()
    images.compare(image, tmp_path / "backup.qcow2")
    server.start()


def test_job_is_listed_steered_and_cancelled(server: NbdBackend, tmp_path: Path) -> None:
    assert command(server, *backup_to(tmp_path / "backup.qcow2", "speed=65536")) == "b0\n"
    command(server, "job", "pause", "b0")
    (job,) = json.loads(command(server, "job", "list", "--json"))
    assert (job["id"], job["type"]) == ("b0", "backup")
    assert "b0" in command(server, "job", "list")
    assert "Job is already paused" in command(server, "job", "pause", "b0", expect=1)
    command(server, "job", "resume", "b0")
    command(server, "job", "set", "b0", "speed=131072")
    command(server, "job", "cancel", "b0")
    with server.qmp() as qmp:
        while qmp.cmd("query-jobs"):
            qmp.wait_job("b0", "null")
    assert command(server, "job", "list") == "no jobs\n"


def test_watching_a_cancelled_job_fails(server: NbdBackend, tmp_path: Path) -> None:
    command(server, *backup_to(tmp_path / "backup.qcow2", "speed=65536"))
    watch = subprocess.Popen(
        [str(executable()), "job", "watch", "b0", "--qmp", str(server.qmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert watch.stdout is not None
    first = watch.stdout.readline()
    assert first == "watching b0\n"
    with server.qmp() as qmp:
        qmp.cmd("job-cancel", {"id": "b0"})
    printed = first + watch.communicate(timeout=30)[0]
    assert watch.returncode == 4
    assert "job b0: cancelled" in printed


def test_watching_a_job_that_is_over_tells_its_end(server: NbdBackend, tmp_path: Path) -> None:
    command(server, *backup_to(tmp_path / "backup.qcow2", "auto-dismiss=false", "--watch"))
    assert "job b0: done" in command(server, "job", "watch", "b0")
    command(server, "job", "dismiss", "b0")


def test_unknown_job_and_type_are_named(server: NbdBackend) -> None:
    unknown = command(server, "job", "pause", "b9", expect=1)
    assert unknown == "nbd-backend: job: 'b9': Job not found; `nbd-backend job list` shows all jobs\n"
    no_type = command(server, "job", "start", "mirror", "device=sda", "target=sdb", expect=1)
    assert no_type == "nbd-backend: job: this server has no jobs of type 'mirror'\n"


def test_one_qmp_command(server: NbdBackend) -> None:
    assert json.loads(command(server, "qmp", "query-jobs")) == []
    assert "The command nope has not been found" in command(server, "qmp", "nope", expect=1)


def test_live_chain_is_drawn(server: NbdBackend, image: Path) -> None:
    assert command(server, "chain").splitlines() == [
        "export sda",
        f"└─ sda  qcow2, 32 MiB, read-write, {image}",
    ]


def test_image_that_is_served_can_be_looked_at(server: NbdBackend, image: Path) -> None:
    for words in (["image", "info"], ["image", "map"], ["chain"]):
        done = subprocess.run(
            [str(executable()), *words, str(image)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert str(image) in done.stdout


def test_events_end_with_the_server(server: NbdBackend) -> None:
    follow = subprocess.Popen(
        [str(executable()), "events", "--qmp", str(server.qmp_path), "BLOCK_EXPORT_DELETED"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert follow.stdout is not None
    with server.qmp() as qmp:
        number = 0
        while True:  # until the follower has connected
            number += 1
            qmp.cmd("block-export-add", {"type": "nbd", "id": f"e{number}", "node-name": "sda", "name": "x"})
            qmp.cmd("block-export-del", {"id": f"e{number}"})
            if number == 100 or follow.poll() is not None:
                break
            if _readable(follow):
                break
    assert "BLOCK_EXPORT_DELETED  id=e" in follow.stdout.readline()
    server.stop()
    assert follow.wait(20) == 0
    follow.stdout.close()
    server.start()


def _readable(process: subprocess.Popen[str]) -> bool:
    import select

    assert process.stdout is not None
    return bool(select.select([process.stdout.fileno()], [], [], 0.05)[0])


@pytest.mark.slow
def test_demonstration_proves_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(executable()), "demo"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Yes: identical, every byte." in done.stdout
