"""A guest whose virtio disk is our export over a unix socket."""

from pathlib import Path

import pytest

from tests.guest import scenario
from tests.guest.kernel import Kernel
from tests.guest.machine import Machine
from tests.support.server import NbdBackend

VIRTIO_DISK = scenario.Attachment(disk="/dev/vda", modules=["virtio_pci", "virtio_blk"])


@pytest.mark.guest
def test_live_backup_under_a_guests_virtio_disk(tmp_path: Path, kernel: Kernel) -> None:
    """mkfs here discards the whole disk first: the export is a virtio disk with `discard=unmap`."""
    initramfs = scenario.build_initramfs(tmp_path / "initramfs", kernel, VIRTIO_DISK)
    disk = scenario.make_disk(tmp_path)
    with NbdBackend(disk, directory=tmp_path) as server:
        drive = ["-drive", f"file={server.uri()},format=raw,if=virtio,discard=unmap"]
        with Machine(kernel, initramfs, tmp_path / "console.log", drive) as machine:
            outcome = scenario.play(server, machine, disk, tmp_path / "backup.qcow2")
    scenario.verify(outcome, tmp_path)
