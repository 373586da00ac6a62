"""Random requests to images of every kind, compared byte for byte with a plain model and with qemu-nbd.

One example is a batch: an image over every kind of base, all served by one server. The same requests go to
qemu-nbd on a copy of each image. Afterwards the images must pass `qemu-img check`, and hold for `qemu-img
compare` what the model holds; the layers below must not have changed by a byte.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.format.chains import CLUSTER_SIZES, make_chain
from tests.format.model import Disk
from tests.format.strategies import BASES, Case, cases
from tests.support import images
from tests.support.nbd_client import NbdClient
from tests.support.qemu_nbd import qemu_nbd
from tests.support.server import NbdBackend

EXAMPLES = max(1, settings().max_examples // 25)
"""Batches for each version and cluster size: 2 by default, 80 under the profile `nightly`."""
PHASES = set(Phase) - ({Phase.shrink} if EXAMPLES < 10 else set())
"""Shrinking a batch takes minutes; the note on a failure names its one case anyway."""


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
@pytest.mark.parametrize("version", [2, 3])
def test_random_operations(version: Literal[2, 3], cluster_size: int) -> None:
    @settings(max_examples=EXAMPLES, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(batch=st.tuples(*(cases(version, cluster_size, base) for base in BASES)))
    def run(batch: Sequence[Case]) -> None:
        run_batch(batch)

    run()


def run_batch(batch: Sequence[Case]) -> None:
    """Run the cases on one server; a failure names its case."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        chains = [make_chain(directory / f"c{number}", case.layers) for number, case in enumerate(batch)]
        lower = {path: digest(path) for top in chains for path in sorted(top.parent.iterdir()) if path != top}
        contents = [flatten(top) for top in chains]
        copies = [Path(shutil.copy(top, top.with_name("copy.qcow2"))) for top in chains]
        with NbdBackend(
            *(f"c{number}={top}" for number, top in enumerate(chains)), directory=directory
        ) as server:
            for number, case in enumerate(batch):
                with describing(case), NbdClient(server.nbd_path, f"c{number}") as client:
                    disk = Disk(
                        client, contents[number], case.top.cluster_size, trim_zeroes=case.top.version == 3
                    )
                    run_case(case, disk)
                    contents[number] = bytes(disk.content)
        for case, top, copy, content in zip(batch, chains, copies, contents, strict=True):
            with describing(case):
                images.check(top)
                compare(top, content)
                run_on_qemu(case, copy, content)
        assert {path: digest(path) for path in lower} == lower


def run_case(case: Case, disk: Disk) -> None:
    """Apply the requests and look at the result."""
    disk.verify()
    for operation in case.operations:
        disk.apply(operation)
    disk.verify()


def run_on_qemu(case: Case, copy: Path, ours: bytes) -> None:
    """Send the same requests to qemu-nbd on a copy; they must end alike but for what was trimmed."""
    with qemu_nbd(copy, copy.with_name("qemu.sock")) as socket, NbdClient(socket) as client:
        disk = Disk(client, flatten(copy), case.top.cluster_size, trim_zeroes=False)
        run_case(case, disk)
    assert outside_trims(case, ours) == outside_trims(case, disk.content)


def outside_trims(case: Case, content: bytes | bytearray) -> bytearray:
    """The content with zeroes wherever something was trimmed: what a server may decide for itself."""
    masked = bytearray(content)
    for operation in case.operations:
        if operation.kind == "trim":
            masked[operation.offset : operation.offset + operation.count] = bytes(operation.count)
    return masked


@contextmanager
def describing(case: Case) -> Iterator[None]:
    """Name the case in a failure of the block."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"run_batch([{case!r}])")
        raise


def flatten(image: Path) -> bytes:
    """What QEMU reads through the chain of `image`."""
    raw = images.convert(image, image.with_name("flat.raw"))
    content = raw.read_bytes()
    raw.unlink()
    return content


def compare(image: Path, content: bytes) -> None:
    """Assert that QEMU reads `content` through the chain of `image`."""
    raw = image.with_name("model.raw")
    raw.write_bytes(content)
    images.compare(image, raw, right_fmt="raw")


def digest(path: Path) -> str:
    """A hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
