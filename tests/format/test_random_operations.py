"""Random requests to images of every kind, compared byte for byte with a plain model and with qemu-nbd.

One server runs for all; each example hands it an image by QMP and takes it away again. The same requests go
to qemu-nbd on a copy of the image. Afterwards the image must pass `qemu-img check` without a leak, and hold
for `qemu-img compare` what the model holds; the layers below must not have changed by a byte.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.format.chains import CLUSTER_SIZES, Version, make_chain
from tests.format.model import Disk
from tests.format.strategies import BASES, Base, Case, cases
from tests.support import images
from tests.support.nbd_client import NbdClient
from tests.support.qemu_nbd import qemu_nbd
from tests.support.server import NbdBackend

EXAMPLES = max(4, settings().max_examples // 20)
"""For each version, cluster size and kind of base: 4 by default, 100 under the profile `nightly`."""


PHASES = tuple(phase for phase in Phase if phase is not Phase.shrink or EXAMPLES > 4)
"""Shrinking takes minutes: only `nightly` has the time."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdBackend]:
    """A server without an image."""
    with NbdBackend(directory=tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
@pytest.mark.parametrize("version", [2, 3])
def test_random_operations(server: NbdBackend, version: Version, cluster_size: int, base: Base) -> None:
    @settings(max_examples=EXAMPLES, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(case=cases(version, cluster_size, base))
    def run(case: Case) -> None:
        with tempfile.TemporaryDirectory() as directory:
            check_case(server, Path(directory), case)

    run()


def check_case(server: NbdBackend, directory: Path, case: Case) -> None:
    """Run a case against the server and against qemu-nbd, and compare."""
    top = make_chain(directory / "chain", case.layers)
    lower = {path: digest(path) for path in top.parent.iterdir() if path != top}
    copy = Path(shutil.copy(top, top.with_name("copy.qcow2")))
    content = flatten(copy)
    with exported(server, top) as client:
        ours = Disk(client, content, case.top.cluster_size, trim_zeroes=case.top.version == 3)
        run_case(case, ours)
    images.check(top)
    compare(top, ours.content)
    with qemu_nbd(copy, directory / "qemu.sock") as socket, NbdClient(socket) as client:
        theirs = Disk(client, content, case.top.cluster_size, trim_zeroes=False)
        run_case(case, theirs)
    assert outside_trims(case, ours.content) == outside_trims(case, theirs.content)
    assert {path: digest(path) for path in lower} == lower


@contextmanager
def exported(server: NbdBackend, image: Path) -> Iterator[NbdClient]:
    """A client of `image`, which the server opens for this and has closed on exit."""
    node = {
        "driver": "qcow2", "node-name": "disk", "discard": "unmap",
        "file": {"driver": "file", "filename": str(image)},
    }  # fmt: skip
    with server.qmp() as qmp:
        qmp.cmd("blockdev-add", node)
        try:
            export = {"type": "nbd", "id": "disk", "node-name": "disk", "name": "disk", "writable": True}
            qmp.cmd("block-export-add", export)
            with NbdClient(server.nbd_path, "disk") as client:
                yield client
        finally:
            qmp.cmd("block-export-del", {"id": "disk", "mode": "hard"})
            qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data["id"] == "disk")
            qmp.cmd("blockdev-del", {"node-name": "disk"})


def run_case(case: Case, disk: Disk) -> None:
    """Apply the requests and look at the result."""
    disk.verify()
    for operation in case.operations:
        disk.apply(operation)
    disk.verify()


def outside_trims(case: Case, content: bytes | bytearray) -> bytearray:
    """The content with zeroes wherever something was trimmed: what a server may decide for itself."""
    masked = bytearray(content)
    for operation in case.operations:
        if operation.kind == "trim":
            masked[operation.offset : operation.offset + operation.count] = bytes(operation.count)
    return masked


def flatten(image: Path) -> bytes:
    """What QEMU reads through the chain of `image`."""
    raw = images.convert(image, image.with_name("flat.raw"))
    content = raw.read_bytes()
    raw.unlink()
    return content


def compare(image: Path, content: bytes | bytearray) -> None:
    """Assert that QEMU reads `content` through the chain of `image`."""
    raw = image.with_name("model.raw")
    raw.write_bytes(content)
    images.compare(image, raw, right_fmt="raw")


def digest(path: Path) -> str:
    """A hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
