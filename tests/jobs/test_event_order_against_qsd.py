"""Our event orders are those of qemu-storage-daemon, which plays the same scripts."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.testing import EventRecorder
from tests.jobs.event_orders import ORDERS, Order, Subject
from tests.support.qmp import Message, QmpClient, QmpError

MiB = 1 << 20
SLOW = 50_000_000  # nanoseconds


class Recording(QmpClient):
    """A client that remembers all events, in order, in one recorder for each of the script's commands."""

    def __init__(self, path: Path) -> None:
        self.recorders = [EventRecorder()]
        super().__init__(path)

    def receive(self, timeout: float = 10.0) -> Message:
        message = super().receive(timeout)
        if "event" in message:
            self.recorders[-1](message["event"], message["data"])
        return message

    def words(self, *, ids: bool) -> list[str]:
        """What was seen, without the flicker of QEMU's internal pauses."""
        return [word for part in self.recorders for word in _without_flicker(part.words(ids=ids))]


def _without_flicker(words: list[str]) -> list[str]:
    """Drop a pause that ends without a command in between."""
    kept: list[str] = []
    for word in words:
        paused = word.replace("running", "paused", 1)
        if word.startswith("running") and paused in kept:
            kept.remove(paused)
        else:
            kept.append(word)
    return kept


@pytest.fixture
def qsd(tmp_path: Path) -> Iterator[Recording]:
    program = shutil.which("qemu-storage-daemon")
    assert program, "qemu-storage-daemon is not installed (Debian package qemu-system-common)"
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # Waiting for us, the daemon greets once; otherwise it may greet twice a client that is too early.
        chardev = f"socket,id=c,fd={listener.fileno()},server=on,wait=on"
        command = [program, "--chardev", chardev, "--monitor", "chardev=c"]
        daemon = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        with Recording(path) as client:
            yield client
    finally:
        daemon.kill()
        daemon.wait(30)


@pytest.mark.parametrize("order", [order for order in ORDERS if order.qemu], ids=lambda order: order.name)
def test_qsd_plays_the_same_story(qsd: Recording, order: Order, tmp_path: Path) -> None:
    _add_nodes(qsd, order)
    _start(qsd, order, tmp_path)
    for index, line in enumerate(order.script):
        if line.startswith(">"):
            verb, _, job = line[1:].partition(" ")
            qsd.recorders.append(EventRecorder())
            qsd.cmd(verb, {"device" if verb.startswith("block-job") else "id": job})
        else:
            _await_words(qsd, order, index + 1)
    qsd.cmd("query-jobs")  # what comes after the last word would be here by now
    _await_words(qsd, order, len(order.script))


def _await_words(qsd: Recording, order: Order, lines: int) -> None:
    """Wait until exactly the events among the first ``lines`` of the script have been seen."""
    ids = len(order.subjects) > 1
    expected = order.events(lines)
    while len(seen := qsd.words(ids=ids)) < len(order.events()) and seen[: len(expected)] != expected:
        try:
            qsd.receive(10)
        except TimeoutError:
            break
    assert seen[: len(expected)] == expected


def _add_nodes(qsd: Recording, order: Order) -> None:
    for index, subject in enumerate(order.subjects):
        size = (64 if subject.endless else 1) * MiB
        null = {"driver": "null-co", "size": size, "read-zeroes": False}
        slow = {"latency-ns": SLOW if index else 0}  # so that the first is done first
        qsd.cmd("blockdev-add", {**null, **slow, "node-name": f"source-{subject.id}"})
        qsd.cmd("blockdev-add", {**_target(subject, null), "node-name": f"target-{subject.id}"})


def _target(subject: Subject, null: Mapping[str, Any]) -> Mapping[str, Any]:
    if not subject.error:
        return null
    fault = {"event": "none", "iotype": "write", "errno": subject.error, "once": True}
    return {"driver": "blkdebug", "image": null, "inject-error": [fault]}


def _start(qsd: Recording, order: Order, tmp_path: Path) -> None:
    if len(order.subjects) == 1 and not order.abort_start:
        command, arguments = _creation(order.subjects[0], tmp_path)
        qsd.cmd(command, arguments)
        return
    actions = []
    for subject in order.subjects:
        kind, data = _creation(subject, tmp_path)
        actions.append({"type": kind, "data": data})
    if order.abort_start:
        with pytest.raises(QmpError, match="Transaction aborted using Abort action"):
            qsd.cmd("transaction", {"actions": [*actions, {"type": "abort", "data": {}}]})
    else:
        qsd.cmd("transaction", {"actions": actions, "properties": {"completion-mode": "grouped"}})


def _creation(subject: Subject, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    if subject.kind == "create":
        parent = tmp_path / "missing" if subject.error else tmp_path
        return "blockdev-create", {
            "job-id": subject.id,
            "options": {"driver": "file", "filename": str(parent / "new"), "size": MiB},
        }
    return f"blockdev-{subject.kind}", {
        "job-id": subject.id,
        "device": f"source-{subject.id}",
        "target": f"target-{subject.id}",
        "sync": "full",
        "speed": 1 if subject.endless else 0,
        "on-target-error": subject.on_error,
        "auto-finalize": subject.auto_finalize,
        "auto-dismiss": subject.auto_dismiss,
    }
