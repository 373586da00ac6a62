"""A guest that attaches our export over TCP with its own kernel's nbd module and nbd-client."""

from pathlib import Path

import pytest

from tests.guest import scenario
from tests.guest.kernel import Kernel
from tests.guest.machine import Machine
from tests.support.server import NbdBackend, free_port

HOST = "10.0.2.2"
"""How QEMU's user-mode network shows the host's 127.0.0.1 to the guest."""


def nbd_disk(port: int) -> scenario.Attachment:
    """The default export, over two connections to `port`."""
    return scenario.Attachment(
        disk="/dev/nbd0",
        modules=["virtio_pci", "virtio_net", "nbd"],
        programs=["nbd-client"],
        attach=f"""
            ip addr add 10.0.2.15/24 dev eth0
            ip link set eth0 up
            nbd-client -C 2 {HOST} {port} /dev/nbd0
        """,
        detach="nbd-client -d /dev/nbd0",
        mkfs_options="-E nodiscard",
    )


@pytest.mark.guest
def test_live_backup_under_a_guests_kernel_nbd_device(tmp_path: Path, kernel: Kernel) -> None:
    """Needs no privileges on the host: the nbd module is the guest's, the network is QEMU's user mode."""
    port = free_port()
    initramfs = scenario.build_initramfs(tmp_path / "initramfs", kernel, nbd_disk(port))
    disk = scenario.make_disk(tmp_path)
    network = ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    with (
        NbdBackend(disk, directory=tmp_path, tcp_port=port) as server,
        Machine(kernel, initramfs, tmp_path / "console.log", network) as machine,
    ):
        outcome = scenario.play(server, machine, disk, tmp_path / "backup.qcow2")
    scenario.verify(outcome, tmp_path)
